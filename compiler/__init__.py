"""Turn a PyTorch model into a deployable inference engine, with the evidence that it still works."""
