"""Recipes: functions that return a whole configuration, one a row of a table. Called `module.function`."""
