"""Which tests take long."""

# Files of whole runs, conversions and processes: four fifths of the time of what needs no PyTorch.
_NAMES = (
    "cli_convert", "cli_editing", "cli_finished", "cli_first_use", "cli_metadata", "cli_process", "cli_replay",
    "cli_schedule", "cli_stopping", "cli_t2i", "cli_writing", "colors", "config", "convert", "convert_assembly",
    "convert_errors", "convert_requantize", "demo", "demo_adapter", "demo_scorer", "device_errors", "doctor",
    "doctor_peaks", "embedding_cache_folder", "float16", "fuzz", "hub", "hub_hostile", "image_names",
    "lora_methods", "machine", "memory", "negative_prompts", "networks", "output", "pipeline", "process_memory",
    "run", "run_cut_short", "store_first_use", "store_parts", "streaming", "upsampling", "upsampling_memory",
    "vae_strips", "weights_reading",
)  # fmt: skip
SLOW = frozenset(f"test_{name}" for name in _NAMES)
