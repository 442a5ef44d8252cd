"""From a recipe to a trained and scored model: reads configs, keeps run folders, starts fairseq's own commands."""
