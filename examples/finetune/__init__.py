"""Fine-tunes a pretrained transformer on little data: dropout, mixout by the plain formula, and mixout_kernels.

``python -m examples.finetune --help`` lists the options.
"""

import os

# Read by huggingface_hub when it is imported: nothing here may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
