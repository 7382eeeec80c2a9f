"""Pictures as inline SVG, drawn by hand.

Horizontal positions are percentages and vertical ones pixels, so that a picture fills a phone or a
page while its text keeps its size. Every picture carries a title and a description in words.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from deploy.manifest import LayerSensitivity, LayerWeights, LayerWidths, RecoveryPoint, Report, Rung, Stage
from deploy.reporting import units
from deploy.reporting.claims import outcome
from deploy.reporting.evidence import (
    baseline,
    direction,
    is_dense,
    machine,
    max_drop,
    measured,
    runtime_of,
    shipped,
)
from deploy.reporting.markup import Markup, el, join

BARS_SHOWN = 40  # more bars than this are a wall; the table beside the picture holds them all
_BAR_LEFT, _BAR_RIGHT = 32.0, 86.0
_ROW = 22
_NARROWEST = 340  # px: labels of points that fit here fit everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A straight map from values to positions, with round ticks."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The position of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def text(self, tick: float, scale: float = 1.0) -> str:
        """A tick with the decimals that its step needs, after scaling."""
        step = (self.ticks[1] - self.ticks[0]) * scale
        return units.fixed(tick * scale, max(0, -math.floor(math.log10(step) + 1e-9)))


def axis(values: Iterable[float], start: float, stop: float, *, zero: bool = False, about: int = 5) -> Axis:
    """An axis over all values between two positions, widened to round ticks."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    low = min(low, 0.0) if zero else low
    if high - low < 1e-12 * max(abs(high), 1.0):
        pad = abs(high) * 0.05 or 1.0
        low, high = (low if zero else low - pad), high + pad
    step = _round_step((high - low) / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Axis(low=ticks[0], high=ticks[-1], start=start, stop=stop, ticks=ticks)


def _round_step(rough: float) -> float:
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(scale * step for step in (1, 2, 5, 10) if scale * step >= rough * 0.999)


def trade(report: Report, numbers: dict[str, int]) -> Markup | None:
    """Accuracy against latency of all rungs timed on one machine, with 95% intervals on both axes."""
    points = [rung for rung in one_machine(report) if measured(rung.accuracy)]
    if not points:
        return None
    sign, metric = direction(report.manifest), points[0].accuracy.metric
    floor = _floor(report, sign)
    heights = [end for rung in points for end in _accuracy_ends(rung, sign)] + ([floor] if floor else [])
    x = axis((end for rung in points for end in _latency_ends(rung)), 13, 96, zero=True)
    y = axis(heights, *((300, 16) if sign > 0 else (16, 300)))
    scale, unit = (100.0, "%") if metric in units.FRACTIONS else (1.0, "")
    body = [_x_axis(x, 300, x.text), _y_axis(y, lambda tick: y.text(tick, scale) + unit, x)]
    body += [_floor_line(floor, y, x)] if floor is not None else []
    body += [_cross(report, rung, x, y, sign) for rung in _shipped_last(report, points)]
    body += _labels(report, points, numbers, x, y)
    body += [_where(points[0], 338)]
    return picture(
        f"{metric} against latency",
        "; ".join(_point_in_words(report, rung, numbers) for rung in points),
        346,
        body,
    )


def one_machine(report: Report) -> list[Rung]:
    """The rungs timed on the machine that timed the shipped one: others cannot share an axis."""
    timed = [rung for rung in report.manifest.rungs if rung.latency.median_ms is not None]
    chosen = shipped(report.manifest)
    reference = chosen if chosen in timed else (timed[0] if timed else None)
    if reference is None:
        return []
    return [rung for rung in timed if rung.latency.measured_on == reference.latency.measured_on]


def speeds(report: Report, numbers: dict[str, int]) -> Markup | None:
    """Latency of each rung with its interval, for builds whose accuracy nobody measured."""
    rungs = one_machine(report)
    if not rungs:
        return None
    x = axis((end for rung in rungs for end in _latency_ends(rung)), _BAR_LEFT, 96, zero=True)
    bottom = 8 + len(rungs) * 26
    body = [_x_axis(x, bottom, x.text)]
    for index, rung in enumerate(rungs):
        y = 20 + index * 26
        low, high = _latency_ends(rung)
        body += [_label(f"{numbers[rung.name]} {rung.name}", y + 4)]
        body += [_line(x.at(low), y, x.at(high), y, class_="whisker")]
        body += [_dot(report, rung, x.at(rung.latency.median_ms or 0.0), y)]
    body += [_where(rungs[0], bottom + 38)]
    words = "; ".join(_point_in_words(report, rung, numbers) for rung in rungs)
    return picture("Latency of each rung", words, bottom + 46, body)


def _where(rung: Rung, y: float) -> Markup:
    """The name of the latency axis; phones get fewer letters of the machine."""
    name = machine(rung.latency.measured_on)
    return join(
        _text(96, y, f"latency in ms, {_cut(name, 70)}", anchor="end", class_="muted wide"),
        _text(96, y, f"latency in ms, {_cut(name, 24)}", anchor="end", class_="muted narrow"),
    )


def _cut(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _floor(report: Report, sign: int) -> float | None:
    dense, allowed = baseline(report.manifest), max_drop(report.manifest)
    if dense is None or dense.accuracy.value is None or allowed is None:
        return None
    return dense.accuracy.value - sign * allowed


def _accuracy_ends(rung: Rung, sign: int) -> tuple[float, float]:
    """The paired interval of the drop, laid about the value."""
    value, drop, interval = rung.accuracy.value or 0.0, rung.accuracy.drop, rung.accuracy.drop_ci95
    if drop is None or not interval:
        return value, value
    low, high = sorted(value - sign * (end - drop) for end in interval)
    return low, high


def _latency_ends(rung: Rung) -> tuple[float, float]:
    median = rung.latency.median_ms or 0.0
    low, high = rung.latency.ci95_ms or (median, median)
    return low, high


def _shipped_last(report: Report, rungs: Sequence[Rung]) -> list[Rung]:
    return sorted(rungs, key=lambda rung: rung.name == report.manifest.shipped_rung)


def _cross(report: Report, rung: Rung, x: Axis, y: Axis, sign: int) -> Markup:
    (left, right), (low, high) = _latency_ends(rung), _accuracy_ends(rung, sign)
    at_x, at_y = x.at(rung.latency.median_ms or 0.0), y.at(rung.accuracy.value or 0.0)
    return join(
        _line(x.at(left), at_y, x.at(right), at_y, class_="whisker"),
        _line(at_x, y.at(low), at_x, y.at(high), class_="whisker"),
        _dot(report, rung, at_x, at_y),
    )


def _dot(report: Report, rung: Rung, x: float, y: float) -> Markup:
    kind = outcome(report, rung).split("-")[0].replace(" ", "-")
    ring = el("circle", cx=_pct(x), cy=_px(y), r=10, class_="ring") if kind == "shipped" else None
    return join(ring, el("circle", cx=_pct(x), cy=_px(y), r=5.5, class_=f"dot {kind}"))


def _labels(report: Report, rungs: Sequence[Rung], numbers: dict[str, int], x: Axis, y: Axis) -> list[Markup]:
    """A number beside each point, in the first free place around it."""
    centres = {
        rung.name: (x.at(rung.latency.median_ms or 0.0), y.at(rung.accuracy.value or 0.0)) for rung in rungs
    }
    taken = [(at_x / 100 * _NARROWEST, at_y) for at_x, at_y in centres.values()]
    drawn = []
    for rung in rungs:
        at_x, at_y = centres[rung.name]
        dx, dy = _free_place(at_x / 100 * _NARROWEST, at_y, taken)
        taken.append((at_x / 100 * _NARROWEST + dx, at_y + dy))
        bold = "strong" if rung.name == report.manifest.shipped_rung else "ink"
        text = el(
            "text", str(numbers[rung.name]), x=_px(dx), y=_px(dy + 4), text_anchor="middle", class_=bold
        )
        drawn.append(el("svg", text, x=_pct(at_x), y=_px(at_y), class_="spill"))
    return drawn


def _free_place(x: float, y: float, taken: list[tuple[float, float]]) -> tuple[float, float]:
    places = [
        (reach * math.cos(turn), -reach * math.sin(turn))
        for reach in (18.0, 30.0, 42.0)
        for turn in (math.pi / 4, 3 * math.pi / 4, -math.pi / 4, -3 * math.pi / 4, 0.0, math.pi)
    ]

    def room(place: tuple[float, float]) -> float:
        return min((math.dist((x + place[0], y + place[1]), other) for other in taken), default=99.0)

    return next((place for place in places if room(place) >= 14), max(places, key=room))


def _point_in_words(report: Report, rung: Rung, numbers: dict[str, int]) -> str:
    score = units.score(rung.accuracy.metric, rung.accuracy.value)
    latency = units.milliseconds(rung.latency.median_ms)
    return f"{numbers[rung.name]} {rung.name}, {outcome(report, rung)}: {latency}, accuracy {score}"


def _floor_line(value: float, y: Axis, x: Axis) -> Markup:
    at = y.at(value)
    text = _text(x.stop, at - 5, "allowed drop", anchor="end", class_="muted")
    return join(_line(x.start, at, x.stop, at, class_="bound"), text)


def waterfall(report: Report) -> Markup | None:
    """Size from the dense float rung to the shipped one, by way of the rungs between."""
    path = size_path(report)
    if len(path) < 2:
        return None
    x = axis([rung.size_bytes or 0 for rung in path], _BAR_LEFT, _BAR_RIGHT, zero=True)
    body = []
    for index, rung in enumerate(path):
        now, row = rung.size_bytes or 0, 2 * index
        if index:
            before = path[index - 1].size_bytes or 0
            body += _change(row - 1, _change_name(path[index - 1], rung), before, now, x)
        kind = "bar strong" if rung.name == report.manifest.shipped_rung else "bar"
        body += _bar(row, rung.name, 0, now, x, units.size(now), kind)
    words = ", then ".join(f"{rung.name} {units.size(rung.size_bytes)}" for rung in path)
    return picture("Size from dense float to shipped", words, (2 * len(path) - 1) * _ROW + 8, body)


def size_path(report: Report) -> list[Rung]:
    """Dense float, a rung that is only pruned or only quantized where there is one, and the shipped rung."""
    first, last = baseline(report.manifest), shipped(report.manifest)
    if first is None or last is None or first is last or first.size_bytes is None or last.size_bytes is None:
        return []
    both = not is_dense(last) and last.precision != "float32"
    between = [
        rung
        for rung in report.manifest.rungs
        if both
        and rung not in (first, last)
        and rung.size_bytes
        and runtime_of(rung.name) == runtime_of(last.name)
    ]
    pruned = [
        r for r in between if (r.pattern, r.precision, r.sparsity) == (last.pattern, "float32", last.sparsity)
    ]
    quantized = [r for r in between if (r.pattern, r.precision) == ("dense", last.precision)]
    return [first, *(pruned or quantized)[:1], last]


def _change_name(before: Rung, after: Rung) -> str:
    parts = [] if before.sparsity == after.sparsity else ["pruning"]
    parts += [] if before.precision == after.precision else [after.precision]
    return " and ".join(parts) or "other form"


def _change(row: int, name: str, before: float, after: float, x: Axis) -> list[Markup]:
    sign = units.MINUS if after <= before else "+"
    share = f"{sign}{abs(after - before) / before:.0%}" if before else ""
    low, high = sorted((before, after))
    return _bar(row, name, low, high, x, share, "bar change", label="muted")


def widths(layers: Sequence[LayerWidths]) -> Markup:
    """Output channels of each layer: what was (outline) and what is left (filled)."""
    return _thinned("Channels before and after pruning", layers)


def zeros(layers: Sequence[LayerWeights]) -> Markup:
    """Weights of each layer: all of them (outline) and those that are not zero (filled)."""
    left = [
        LayerWidths(layer=each.layer, kind=each.kind, before=each.weights, after=each.weights - each.zeros)
        for each in layers
    ]
    return _thinned("Weights that are not zero", left)


def _thinned(title: str, layers: Sequence[LayerWidths]) -> Markup:
    shown = _most(layers, lambda layer: layer.before - layer.after)
    x = axis([layer.before for layer in shown], _BAR_LEFT, _BAR_RIGHT, zero=True)
    body = []
    for row, layer in enumerate(shown):
        text = f"{units.count(layer.before)} → {units.count(layer.after)}"
        body += _bar(row, layer.layer, 0, layer.before, x, text, "bar hollow")
        kind = "bar" if layer.before == layer.after else "bar strong"
        body += [_rect(x.at(0), row * _ROW + 5, x.at(layer.after), 12, kind)]
    words = ", ".join(f"{layer.layer} {layer.before} to {layer.after}" for layer in shown)
    return picture(title, words, len(shown) * _ROW + 4, body)


def sensitivity(layers: Sequence[LayerSensitivity]) -> Markup:
    """Output SNR when one layer alone is quantized, most sensitive first; the kept ones marked."""
    shown = sorted(layers, key=lambda layer: layer.snr_db)[:BARS_SHOWN]
    finite = [layer.snr_db for layer in shown if math.isfinite(layer.snr_db)]
    x = axis([0.0, *finite], _BAR_LEFT, _BAR_RIGHT, zero=True)
    body = []
    for row, layer in enumerate(shown):
        end = layer.snr_db if math.isfinite(layer.snr_db) else x.high
        kind, note = ("bar warm", " float") if layer.kept_float else ("bar strong", "")
        body += _bar(row, layer.layer, 0, end, x, f"{units.number(layer.snr_db)} dB{note}", kind)
    words = ", ".join(f"{layer.layer} {units.number(layer.snr_db)} dB" for layer in shown)
    return picture("Sensitivity by layer", words, len(shown) * _ROW + 4, body)


def stages(durations: Sequence[Stage]) -> Markup:
    """How long each stage took; cached ones hollow."""
    x = axis([stage.seconds for stage in durations], _BAR_LEFT, _BAR_RIGHT, zero=True)
    body = []
    for row, stage in enumerate(durations):
        text = "cached" if stage.cached else units.seconds(stage.seconds)
        kind = "bar hollow" if stage.cached else "bar"
        body += _bar(row, stage.name, 0, stage.seconds, x, text, kind)
    words = ", ".join(
        f"{stage.name} {'cached' if stage.cached else units.seconds(stage.seconds)}" for stage in durations
    )
    return picture("Duration of each stage", words, len(durations) * _ROW + 4, body)


def curve(points: Sequence[RecoveryPoint], of: Callable[[RecoveryPoint], float], name: str) -> Markup | None:
    """One quantity of recovery by epoch."""
    drawn = [(point.epoch, of(point)) for point in points if math.isfinite(of(point))]
    if not drawn:
        return None
    x = axis([epoch for epoch, _ in drawn], 13, 96, about=6)
    y = axis([value for _, value in drawn], 150, 14, about=4)
    # Epochs are whole: a tick at half of one would mean nothing.
    whole = Axis(
        low=x.low, high=x.high, start=x.start, stop=x.stop, ticks=tuple(t for t in x.ticks if t == round(t))
    )
    at = [(x.at(epoch), y.at(value)) for epoch, value in drawn]
    body = [_x_axis(whole, 150, lambda value: str(round(value))), _y_axis(y, y.text, x)]
    body += [_line(*start, *stop, class_="trace") for start, stop in pairwise(at)]
    body += [el("circle", cx=_pct(left), cy=_px(top), r=3, class_="dot not-chosen") for left, top in at]
    body += [_text(96, 186, "epoch", anchor="end", class_="muted")]
    words = ", ".join(f"epoch {epoch}: {units.number(value)}" for epoch, value in drawn)
    return picture(name, words, 192, body)


def picture(title: str, words: str, height: float, body: Iterable[Markup]) -> Markup:
    """An SVG as wide as its column, described for those who do not see it."""
    described = (el("title", title), el("desc", words))
    return el(
        "svg", described, body, role="img", width="100%", height=_px(height), aria_label=f"{title}: {words}"
    )


def _most(layers: Sequence[LayerWidths], weight: Callable[[LayerWidths], float]) -> list[LayerWidths]:
    """The heaviest layers, still in the model's order."""
    if len(layers) <= BARS_SHOWN:
        return list(layers)
    kept = sorted(range(len(layers)), key=lambda index: (-weight(layers[index]), index))[:BARS_SHOWN]
    return [layers[index] for index in sorted(kept)]


def _bar(
    row: int, name: str, low: float, high: float, x: Axis, text: str, kind: str, label: str = "ink"
) -> list[Markup]:
    top = row * _ROW + 5
    end = max(x.at(low), x.at(high))
    return [
        _label(name, top + 10, label),
        _rect(x.at(low), top, x.at(high), 12, kind),
        el("svg", el("text", text, x=6, y=10, class_="value"), x=_pct(end), y=_px(top), class_="spill"),
    ]


def _rect(left: float, top: float, right: float, height: float, kind: str) -> Markup:
    left, right = sorted((left, right))
    width = max(right - left, 0.15)  # a bar of nothing still shows as a hairline
    return el("rect", x=_pct(left), y=_px(top), width=_pct(width), height=_px(height), rx=2, class_=kind)


def _label(name: str, y: float, kind: str = "ink") -> Markup:
    """A row's name, shortened from the front where the end tells more; phones get fewer letters."""
    wide = el("text", _shortened(name, 38), x=0, y=_px(y), class_=f"{kind} wide")
    narrow = el("text", _shortened(name, 15), x=0, y=_px(y), class_=f"{kind} narrow")
    return join(wide, narrow)


def _shortened(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"…{name[-(letters - 1) :]}"


def _x_axis(x: Axis, bottom: float, text: Callable[[float], str]) -> Markup:
    ticks = [_text(x.at(tick), bottom + 18, text(tick), anchor="middle", class_="muted") for tick in x.ticks]
    return join(_line(x.start, bottom, x.stop, bottom, class_="axis"), ticks)


def _y_axis(y: Axis, text: Callable[[float], str], x: Axis) -> Markup:
    lines = [_line(x.start, y.at(tick), x.stop, y.at(tick), class_="grid") for tick in y.ticks]
    return join(
        lines, [_text(x.start - 1.5, y.at(t) + 4, text(t), anchor="end", class_="muted") for t in y.ticks]
    )


def _text(x: float, y: float, text: str, *, anchor: str, class_: str) -> Markup:
    return el("text", text, x=_pct(x), y=_px(y), text_anchor=anchor, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> Markup:
    return el("line", x1=_pct(x1), y1=_px(y1), x2=_pct(x2), y2=_px(y2), class_=class_)


def _pct(value: float) -> str:
    return f"{value:.2f}%"


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
