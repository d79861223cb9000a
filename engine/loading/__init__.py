"""From files to networks: what a model is, where its weights lie, and how their keys are renamed."""
