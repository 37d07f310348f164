"""Stages 7 to 9: score an engine against the original, time both, and judge. Measuring and judging never mix."""
