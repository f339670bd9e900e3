"""What is where in a model's folder as diffusers lays it out."""

import re

INDEX = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS = ".safetensors"
WEIGHTS = (SAFETENSORS, ".gguf")  # endings of files that are read
SET_INDEX = ".safetensors.index.json"  # the ending of the file that lists a set
NUMBERS = r"-(?P<number>\d{5})-of-(?P<count>\d{5})"  # of a file in its set
SHARD = re.compile(rf"(?P<stem>.+?){NUMBERS}(?P<end>\.[a-z0-9]+)")  # one file of a set
