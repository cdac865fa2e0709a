"""What only a GPU can show. Tests that train with `device: auto` run there by themselves."""

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
