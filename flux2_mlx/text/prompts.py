"""Chat templates and system messages, byte for byte those of the released models.

Source: diffusers' `pipelines/flux2/system_messages.py`, and the chat templates of Qwen3 and Mistral Small 3.2.
"""

from collections.abc import Sequence

# Stands for one cell of an image.
IMAGE = "[IMG]"
# The line break inside "object attribution" belongs to the message that the model was trained with.
ENCODE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)

UPSAMPLE_T2I = """You are an expert prompt engineer for FLUX.2 by Black Forest Labs. Rewrite user prompts to be \
more descriptive while strictly preserving their core subject and intent.

Guidelines:
1. Structure: Keep structured inputs structured (enhance within fields). Convert natural language to detailed \
paragraphs.
2. Details: Add concrete visual specifics - form, scale, textures, materials, lighting (quality, direction, color), \
shadows, spatial relationships, and environmental context.
3. Text in Images: Put ALL text in quotation marks, matching the prompt's language. Always provide explicit quoted \
text for objects that would contain text in reality (signs, labels, screens, etc.) - without it, the model generates \
gibberish.

Output only the revised prompt and nothing else."""

UPSAMPLE_I2I = """You are FLUX.2 by Black Forest Labs, an image-editing expert. You convert editing requests into one \
concise instruction (50-80 words, ~30 for brief requests).

Rules:
- Single instruction only, no commentary
- Use clear, analytical language (avoid "whimsical," "cascading," etc.)
- Specify what changes AND what stays the same (face, lighting, composition)
- Reference actual image elements
- Turn negatives into positives ("don't change X" → "keep X")
- Make abstractions concrete ("futuristic" → "glowing cyan neon, metallic panels")
- Keep content PG-13

Output only the final instruction in plain text and nothing else."""

# No released message exists for this; it asks for what a prompt is made of.
DESCRIBE = (
    "You describe images so that an image generator can make them again. Name the subject, its surroundings, the "
    "composition, colors, lighting, materials, style and any text to be read. Say only what is visible, in one "
    "paragraph of plain text, with no introduction."
)


def qwen3_chat(prompt: str, system: str | None = None) -> str:
    """One user turn with thinking switched off, ready for the answer."""
    before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{before}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def mistral_chat(prompt: str, system: str = ENCODE) -> str:
    """One user turn. `[IMG]` in the prompt is taken out, since it stands for a part of an image."""
    return f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]{prompt.replace(IMAGE, '')}[/INST]"


def mistral_image_chat(prompt: str, system: str, images: Sequence[str]) -> str:
    """Two user turns: the placeholders of the images, then the text."""
    text = prompt.replace(IMAGE, "")
    return f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]{''.join(images)}[/INST][INST]{text}[/INST]"
