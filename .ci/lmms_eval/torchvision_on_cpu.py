"""Let `import torchvision` work beside a CPU build of torch where the index only has the CUDA build of torchvision.

Its C++ library then does not load, and its Python side stumbles over two operators that the library would have
declared. Declaring them is enough for what processors use (transforms); the operators themselves stay unusable.
The install scripts copy this file into site-packages, beside a .pth file that imports it: an environment's business,
and no part of vtc. Nothing is loaded before torchvision is.
"""

import sys
from importlib.abc import MetaPathFinder

_DECLARED = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept_alive = []


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
                library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in _DECLARED:
                    library.define(schema)
                _kept_alive.append(library)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
