"""English words of the invented language pair and the classes that decide how they combine; tables only, no code.

The words are ordinary English ones, put together by the grammar of invented.py; no sentence comes from elsewhere. A
noun is written `word` or `word/plural`, a verb `base past ing`, where `ing` is left out if it is base + "ing".
"""

from __future__ import annotations

# Kind of noun -> words. A ":m" or ":f" fixes the gender of a person; other genders are drawn.
NOUNS = {
    "person": "teacher doctor farmer king:m queen:f soldier sailor child/children singer painter baker judge hunter"
    " woman/women:f man/men:m girl:f boy:m neighbour guest thief/thieves driver nurse student writer friend brother:m"
    " sister:f mother:f father:m stranger",
    "animal": "dog cat horse wolf/wolves fox/foxes bird goat mouse/mice snake bear rabbit duck owl",
    "food": "apple loaf/loaves cake egg onion soup pear cheese potato/potatoes nut carrot pie",
    "drink": "tea wine milk juice beer coffee",
    "text": "letter book song poem map story/stories report list newspaper contract",
    "tool": "knife/knives box/boxes lamp key cup hammer rope chair table coat ring clock mirror basket shirt candle",
    "place": "house garden river bridge forest village church/churches school market tower field island kitchen street"
    " harbour hill castle",
    "vehicle": "ship cart bicycle train boat wagon car",
    "idea": "plan question answer rule secret problem reason dream truth lesson",
}

# One stem in the invented language, two words in English: the kind that the verb or the preposition asks for decides.
SHARED_NOUN_STEMS = (
    ("key", "answer"),
    ("ring", "tower"),
    ("list", "field"),
    ("nut", "problem"),
    ("rule", "bridge"),
    ("cart", "map"),
)

# Two stems in the invented language, one word in English; a person has one of each gender.
DOUBLE_NOUNS = (
    "teacher",
    "doctor",
    "neighbour",
    "student",
    "friend",
    "singer",
    "dog",
    "cat",
    "horse",
    "house",
    "letter",
    "knife",
    "ship",
)

# Nouns that may stand first in a compound.
COMPOUND_MODIFIERS = ("river", "forest", "garden", "kitchen", "school", "apple", "wine", "horse", "village", "church")
COMPOUND_HEADS = ("tool", "place", "vehicle", "food")

# Verbs with an object: (verb, kinds of object). Several verbs in one row share a stem, and the object's kind decides.
TRANSITIVE = (
    (("see saw", "person animal place vehicle"),),
    (("hear heard", "person animal"),),
    (("love loved loving", "person animal food"),),
    (("watch watched", "person animal"),),
    (("follow followed", "person animal vehicle"),),
    (("help helped", "person"),),
    (("visit visited", "person place"),),
    (("hide hid hiding", "tool text food"),),
    (("carry carried", "tool food"),),
    (("break broke", "tool"),),
    (("paint painted", "place tool vehicle"),),
    (("build built", "place vehicle"),),
    (("buy bought", "food drink tool vehicle text"),),
    (("sell sold", "food drink tool vehicle text"),),
    (("steal stole", "tool text vehicle food"),),
    (("burn burned", "text"),),
    (("translate translated translating", "text"),),
    (("explain explained", "idea"),),
    (("remember remembered", "idea"),),
    (("discuss discussed", "idea text"),),
    (("taste tasted tasting", "food drink"),),
    (("pour poured", "drink"),),
    (("push pushed", "vehicle"),),
    (("leave left leaving", "place"),),
    (("feed fed", "animal"),),
    (("choose chose choosing", "tool food text"),),
    (("eat ate", "food"), ("drink drank", "drink")),
    (("read read", "text"), ("understand understood", "idea")),
    (("drive drove driving", "vehicle"), ("lead led", "person")),
    (("catch caught", "animal"), ("reach reached", "place")),
    (("repair repaired", "tool"), ("heal healed", "person")),
    (("lose lost losing", "tool text"), ("forget forgot forgetting", "idea")),
    (("clean cleaned", "place"), ("wash washed", "vehicle")),
    (("write wrote writing", "text"), ("draw drew", "animal person")),
)
DITRANSITIVE = (
    "give gave giving",
    "show showed",
    "bring brought",
    "lend lent",
    "send sent",
    "promise promised promising",
)
DITRANSITIVE_KINDS = "tool text food"
INTRANSITIVE = (
    "sleep slept",
    "laugh laughed",
    "sing sang",
    "dance danced dancing",
    "cry cried",
    "wait waited",
    "swim swam swimming",
    "work worked",
    "rest rested",
    "smile smiled smiling",
)
MOTION = (
    "go went",
    "run ran running",
    "walk walked",
    "climb climbed",
    "jump jumped",
    "return returned",
    "come came coming",
)
LOCATIVE = ("live lived living", "stay stayed", "sit sat sitting", "stand stood", "play played")
SAYING = ("say said", "think thought", "know knew", "believe believed believing", "hope hoped hoping", "fear feared")
QUOTING = ("say said", "ask asked", "answer answered", "shout shouted")

ADJECTIVES = (
    "old",
    "young",
    "big",
    "small",
    "red",
    "green",
    "black",
    "white",
    "beautiful",
    "ugly",
    "strange",
    "famous",
    "poor",
    "rich",
    "happy",
    "angry",
    "quiet",
    "dangerous",
    "broken",
    "golden",
    "expensive",
    "cheap",
    "blue",
    "tired",
)
# One stem, two words by the kind of the noun.
SHARED_ADJECTIVES = (
    ("clever", "person animal", "sharp", "tool"),
    ("difficult", "idea text", "hard", "food tool"),
    ("tall", "person", "high", "place"),
    ("fresh", "food drink", "new", "text idea tool vehicle place"),
    ("bright", "place tool", "clear", "idea text"),
    ("wild", "animal", "fast", "vehicle"),
)

# Another word for the same thing, used at random: no model can foresee it, as in real text.
SYNONYMS = {
    "big": "large",
    "small": "little",
    "happy": "glad",
    "angry": "furious",
    "famous": "well-known",
    "fast": "quick",
    "quickly": "fast",
    "begin": "start",
}

MANNERS = ("quickly", "slowly", "quietly", "carefully", "together", "alone", "loudly")
# English, tense it goes with ("" any), whether it asks for the progressive.
TIMES = (
    ("yesterday", "past", False),
    ("last year", "past", False),
    ("two days ago", "past", False),
    ("every day", "present", False),
    ("often", "present", False),
    ("now", "present", True),
    ("tomorrow", "future", False),
    ("next week", "future", False),
    ("soon", "future", False),
    ("today", "", False),
    ("in the evening", "", False),
)
# English for the place where (dative) and the place to which (accusative).
PREPOSITIONS = (
    ("in", "into"),
    ("on", "onto"),
    ("behind", "behind"),
    ("near", "towards"),
    ("at", "to"),
    ("under", "under"),
)
CONJUNCTIONS = ("because", "when", "although", "if", "while", "before")
COORDINATORS = ("and", "but", "so")
QUESTION_WORDS = ("why", "when", "how")

UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TEENS = ("ten", "eleven", "twelve")
