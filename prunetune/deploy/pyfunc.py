"""The `loader_module` of models that earlier versions saved for MLflow."""

from prunetune.export.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
