"""Names of files in a model's folder as diffusers lays it out."""

INDEX = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
