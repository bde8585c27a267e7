"""What a run will need, before anything is queued: arithmetic over a config, a GPU's data sheet and a number of GPUs.

    request (which model, how many samples) -> activations (what layers keep) -> memory (bytes of a rank)
        -> traffic (what ranks exchange) -> times (step, run) -> settings (what fits) -> report (text, JSON)

All of it runs on any CPU and allocates nothing: the model is built on the meta device, for its parameters' shapes.
"""
