"""Our quantisation and that of other tools, on the same files and samples; see ``scripts/bench_quantize.py``.

Modules under ``tools`` and the worker run in the tools' own environments: they may import nothing of ``compiler`` but
where the tool is ours, and nothing outside the standard library at module level.
"""
