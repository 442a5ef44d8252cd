"""Installs the plugin. `bash scripts/setup.sh` does all of it, fairseq included, in one command."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="intra-distillation-fairseq",
    version="0.1.0",
    description="Intra-distillation (Xu, Koehn, Murray, EMNLP 2022) as a fairseq plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["intra_distillation_fairseq", "intra_distillation_fairseq.*"]),
    python_requires=">=3.9",
    install_requires=[
        "torch>=2.6",
        # Pinned: another sentencepiece learns another vocabulary from the same text (0.2.3 differs from 0.2.0),
        # another sacremoses or sacrebleu may change a byte of the data or of a score.
        "sentencepiece==0.2.3",
        "sacrebleu==2.6.0",
        "sacremoses==0.2.0",
        "numpy",
        "regex",  # Perl's character classes, for text equal to Moses'
        "PyYAML",
        "tqdm",
    ],
    extras_require={
        # An extra, not a requirement: a plain build of fairseq downloads gigabytes for its build environment, and a
        # fairseq that is already there under another name would be overwritten. scripts/setup.sh builds it in seconds.
        "fairseq": [
            "fairseq==0.12.2; python_version < '3.11'",
            "fairseq-fixed==0.12.3.1; python_version >= '3.11'",
            "tensorboardX",  # what fairseq's --tensorboard-logdir writes with; without it every command says so
        ],
        "figures": ["matplotlib"],
        # The loss in one kernel on a GPU. torch for CUDA brings the version it was built with.
        "triton": ["triton>=3.2; sys_platform == 'linux'"],  # 3.2, 3.6 and 3.9 were tried
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff"],
    },
    entry_points={"console_scripts": ["intra-distillation = intra_distillation_fairseq.cli.main:main"]},
    zip_safe=False,
)
