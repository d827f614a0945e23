"""Labels for files of images, from the command line (`python -m ragged.predict`) and in Ray Data: `find` lists files,
`Read` makes tensors of them on CPU cores, `Classify` labels those on one device."""

from .classify import Classify
from .reading import Read, find

__all__ = ["Classify", "Read", "find"]
