"""One module per tool: ``load()`` imports it, ``run(job, meter)`` quantises and returns ``{"files": {method: path}}``.

``session`` in what ``run`` returns says how ONNX Runtime is to open the files, where that is not the default;
``runtime`` is ``onnxruntime`` (the default) or ``openvino``.
"""
