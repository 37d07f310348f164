"""The only place that knows the order of the steps, their keys and the store."""
