"""Model aliases, their calibration, published drop lists, and where models come from."""

from dropformer.recipes.recipe import Calibration, Recipe, Result, Wheel, recipe, recipes
from dropformer.recipes.source import Source, open_config, open_source

__all__ = ["Calibration", "Recipe", "Result", "Source", "Wheel", "open_config", "open_source", "recipe", "recipes"]
