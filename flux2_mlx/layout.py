"""What is where in a model's folder as diffusers lays it out."""

INDEX = "model_index.json"
# Folders of weights, and of those that writing text takes; the rows of `components` say the same.
PARTS, WRITING_PARTS = ("transformer", "text_encoder", "vae"), ("text_encoder",)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", ".gguf")  # endings of files that are read
