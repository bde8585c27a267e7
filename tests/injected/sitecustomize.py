"""On PYTHONPATH of a training run: once `swin_scale.train` is imported, break what the variable FAULT names."""

import importlib.util
import os
import sys


class _AfterImport:
    def find_spec(self, name, path=None, target=None):
        if name != "swin_scale.train":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            import injections

            for fault in os.environ["FAULT"].split(";"):
                kind, *arguments = fault.split(":")
                getattr(injections, kind)(*arguments)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AfterImport())
