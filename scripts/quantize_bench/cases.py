"""The models, what is asked of each, and where its bars stand. A new model is one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One limit on a number of our row ``method`` at ``count`` samples (None: the case's main count)."""

    text: str
    number: str
    """Key of `rows.Row.numbers`."""
    limit: float
    at_least: bool = False
    method: str = "auto"
    count: int | None = None

    def met(self, value: float) -> bool:
        """NaN meets no bar."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on the bench. ``recipe`` names its source, axes and samples; None: `stack.write` makes it."""

    name: str
    recipe: Path | None
    what: str
    counts: tuple[int, ...]
    """Calibration samples; accuracy and latency are measured at ``main_count``."""
    main_count: int
    calibration: int
    """How many samples are stored for calibration, where the source has as many."""
    evaluation: int
    accuracy: tuple[str, ...]
    """Keys of `accuracy.MEASURES`, the first ranks the peers."""
    batches: tuple[int, ...] = (1, 8)
    methods: Mapping[str, tuple[str, ...]]
    """By tool, what of it runs at every count."""
    engines: Mapping[str, Mapping[str, object]] | None = None
    """For ours, in place of methods: engine name to fields of ``[[engines]]``."""
    bars: tuple[Bar, ...] = ()
    constants: Mapping[str, int] | None = None
    """Set in the source's module before its samples are drawn, e.g. for more of them."""
    transformer: bool = False
    timed: bool = True


OURS = ("auto", "minmax", "percentile", "entropy", "mse")
_CONVOLUTIONS: Mapping[str, tuple[str, ...]] = {
    "ours": OURS,
    "ort": ("minmax", "percentile", "entropy", "minmax-u8s8", "dynamic"),
    "nncf": ("onnx", "openvino"),
    "modelopt": ("max", "entropy"),
    "optimum": ("minmax",),
    "olive": ("minmax",),
}
_TRANSFORMER: Mapping[str, tuple[str, ...]] = {
    **_CONVOLUTIONS,
    "ort": (*_CONVOLUTIONS["ort"][:4], "minmax-u8s8-products", "dynamic"),
}


def plain_plus(seconds: float, factor: float, count: int | None = None, method: str = "auto") -> Bar:
    """A bar on CPU seconds that scales with plain inference."""
    at = f" at N = {count}" if count else ""
    times = f"{factor:g}x " if factor != 1 else ""
    text = f"calibration and Q/DQ{at}, {method}: CPU s beyond {times}plain inference <= {seconds:g}"
    return Bar(text=text, number=f"beyond_{factor:g}x_s", limit=seconds, count=count, method=method)


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(
            name="minilm",
            recipe=ROOT / "recipes/minilm.toml",
            what="all-MiniLM-L6-v2, mean pooling and L2 norm in the graph, 128 tokens",
            counts=(32, 128),
            main_count=128,
            calibration=256,
            evaluation=768,
            accuracy=("cosine", "retrieval_top1"),
            methods={**_TRANSFORMER, "ours": ("auto", "minmax", "mse", "gptq", "searched")},
            transformer=True,
            bars=(
                Bar(text="cosine to FP32 >= 0.999", number="cosine", limit=0.999, at_least=True),
                Bar(text="top-1 retrieval agreement >= 98 %", number="retrieval_top1", limit=0.98, at_least=True),
                Bar(text="latency <= 0.60x ORT-FP32, batch 1", number="ratio_b1", limit=0.60),
                Bar(text="latency <= 0.60x ORT-FP32, batch 8", number="ratio_b8", limit=0.60),
                plain_plus(8, 1),
                Bar(text="peak <= 0.9 GB", number="peak_gb", limit=0.9),
                *(
                    Bar(text=f"searched: {text}", number=number, limit=limit, at_least=at_least, method="searched")
                    for text, number, limit, at_least in (
                        ("cosine to FP32 >= 0.999", "cosine", 0.999, True),
                        ("top-1 retrieval agreement >= 98 %", "retrieval_top1", 0.98, True),
                        ("latency <= 0.60x ORT-FP32, batch 1", "ratio_b1", 0.60, False),
                        ("latency <= 0.60x ORT-FP32, batch 8", "ratio_b8", 0.60, False),
                    )
                ),
            ),
        ),
        Case(
            name="digits",
            recipe=ROOT / "recipes/digits.toml",
            what="ResNet-14 on scikit-learn's digits",
            counts=(32, 128),
            main_count=128,
            calibration=130,
            evaluation=900,
            accuracy=("sqnr_db", "top1_agreement"),
            methods={**_CONVOLUTIONS, "ours": (*OURS, "gptq", "adaround")},
            bars=(
                Bar(text="SQNR of the logits >= 42 dB", number="sqnr_db", limit=42.0, at_least=True),
                Bar(text="latency <= 0.55x ORT-FP32, batch 1", number="ratio_b1", limit=0.55),
                Bar(text="latency <= 0.55x ORT-FP32, batch 8", number="ratio_b8", limit=0.55),
            ),
        ),
        Case(
            name="resnet50",
            recipe=ROOT / "recipes/resnet50.toml",
            what="ResNet-50 at 224 x 224, random weights: cost, and agreement",
            counts=(32, 128, 512),
            main_count=128,
            calibration=512,
            evaluation=64,
            accuracy=("sqnr_db", "top1_agreement"),
            methods={**_CONVOLUTIONS, "ours": ("mse", "auto")},
            constants={"CALIBRATION": 512},
            bars=(
                *(plain_plus(5, 1.5, count, method) for count in (32, 128, 512) for method in ("mse", "auto")),
                *(
                    Bar(
                        text=f"peak <= 0.9 GB at N = {count}, {method}",
                        number="peak_gb",
                        limit=0.9,
                        count=count,
                        method=method,
                    )
                    for count in (32, 128, 512)
                    for method in ("mse", "auto")
                ),
                Bar(text="peak flat from 32 to 512 samples, within 5 %", number="peak_growth", limit=0.05, count=512),
            ),
        ),
        Case(
            name="gpt2",
            recipe=HERE / "gpt2.toml",
            what="GPT-2 small by shape, random weights, tied head, 128 tokens",
            counts=(8, 32),
            main_count=32,
            calibration=128,
            evaluation=4,
            accuracy=("sqnr_db", "top1_agreement"),
            methods={**_TRANSFORMER, "ours": ("auto",), "olive": ()},
            transformer=True,
            bars=(
                Bar(text="peak <= FP32 file + 1 GB", number="peak_over_model_gb", limit=1.0),
                Bar(text="file <= 0.3x", number="size_ratio", limit=0.3),
            ),
        ),
        Case(
            name="stack",
            recipe=None,
            what="2.5 GB of FP32 weights in external data: 18 gated feed-forward blocks",
            counts=(32,),
            main_count=32,
            calibration=128,
            evaluation=8,
            accuracy=("sqnr_db",),
            methods={
                "ours": ("int4", "int8"),
                "ort": ("int4", "minmax", "dynamic"),
                "nncf": ("onnx-int4", "onnx", "openvino-int4"),
                "modelopt": ("int4", "max"),
            },
            # Random weights are not worth a limit: INT4 of 18 blocks of them leaves 9.6 dB.
            engines={"int4": {"precision": "int4", "quantize": {"min_sqnr_db": 0.0}}, "int8": {"precision": "int8"}},
            timed=False,
            bars=(
                Bar(
                    text="INT4 weights: peak <= 1.5x the FP32 weights",
                    number="peak_over_weights",
                    limit=1.5,
                    method="int4",
                ),
                Bar(text="W8A8: peak <= 1.5x the FP32 weights", number="peak_over_weights", limit=1.5, method="int8"),
            ),
        ),
        Case(
            name="decoder_outliers",
            recipe=ROOT / "recipes/decoder_outliers.toml",
            what="a byte-level decoder of 1.7 M parameters with six outlying channels, 128 bytes",
            counts=(128,),
            main_count=128,
            calibration=128,
            evaluation=256,
            accuracy=("top1_agreement", "sqnr_db"),
            methods={**_TRANSFORMER, "ours": ("auto", "searched")},
            transformer=True,
            bars=(
                Bar(
                    text="searched: top-1 agreement >= 99 %",
                    number="top1_agreement",
                    limit=0.99,
                    at_least=True,
                    method="searched",
                ),
            ),
        ),
    )
}
