"""Stand-in for torch's build helper, seen only while setup.sh builds fairseq.

fairseq's setup.py links three extensions against torch (speech, non-autoregressive models). They take minutes to
compile and translation never loads them. This stand-in marks them and leaves them out of the build, so that fairseq's
own, unchanged setup.py compiles the Cython and BLEU extensions only: seconds instead of minutes, and no torch needed.
"""

from setuptools import Extension
from setuptools.command.build_ext import build_ext


class TorchExtension(Extension):
    """An extension that would link against torch."""


def CppExtension(name, sources, **kwargs):
    return TorchExtension(name, sources)


CUDAExtension = CppExtension


class BuildExtension(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.extensions = [e for e in self.extensions if not isinstance(e, TorchExtension)]
