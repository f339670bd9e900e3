"""What MLX says where a GPU of Apple stops."""

HEAD = "[METAL] Command buffer execution failed: "
OUT_OF_MEMORY = f"{HEAD}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
TIMEOUT = f"{HEAD}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
INTERACTIVITY = f"{HEAD}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
TOO_LARGE = (
    "[metal::malloc] Attempting to allocate 40000000000 bytes which is greater than the maximum allowed buffer size of "
    "22906503168 bytes."
)
