"""Which rule serves which layer, for a summary."""

from collections.abc import Iterator

from keras_influence.gradients.coverage import Coverage


def coverage_lines(coverage: Coverage | None) -> Iterator[str]:
    """Shares of the parameters by rule, and a line for each layer; `None`: not known yet."""
    if coverage is None:
        yield "layers: known after `fit`"
        return
    yield "parameters by the rule that serves them:"
    for rule, share in coverage.shares().items():
        yield f"  {share:6.1%}  {rule}"
    yield "layers:"
    layers: dict[tuple[str, str], int] = {}
    for row in coverage.served:
        layers[row.layer, row.rule] = layers.get((row.layer, row.rule), 0) + row.parameters
    width = max(len(layer) for layer, _ in layers)
    for (layer, rule), parameters in layers.items():
        yield f"  {layer or '-':{width}}  {parameters:>12,}  {rule}"
