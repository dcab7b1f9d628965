"""The Markdown of benchmarks.loss, computed from the kept raw samples alone.

n rows that carry loss, V vocabulary, H width.
"""

from __future__ import annotations

import statistics
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
LARGE = 128_256


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """(lower, median, upper)."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def ceiling(result: dict[str, Any], name: str) -> float:
    """Bytes/s ("copy") or operations/s ("gemm"): the faster of the measurements before and after the cases."""
    field = "bytes" if name == "copy" else "operations"
    return max(c[name][field] / (1e-3 * statistics.median(c[name]["ms"])) for c in result["ceilings"])


def measured(case: dict[str, Any], *, ours: bool | None = None) -> list[dict[str, Any]]:
    """The arms of a case that may be printed, fastest first."""
    arms = [arm for arm in case["arms"] if arm["ms"] and not arm["refused"] and not arm["not_run"]]
    arms = [arm for arm in arms if ours is None or arm["ours"] == ours]
    return sorted(arms, key=lambda arm: statistics.median(arm["ms"]))


def floor_ms(result: dict[str, Any], case: dict[str, Any]) -> float:
    """The time that the machine's ceiling allows: its products, or one read and one write of given logits."""
    if case["floor_bytes"]:
        return 1e3 * case["floor_bytes"] / ceiling(result, "copy")
    return 1e3 * case["operations"] / ceiling(result, "gemm")


def ratios(arm: dict[str, Any], base: dict[str, Any]) -> list[float]:
    """Time of `arm` over time of `base`, round by round."""
    return [a / b for a, b in zip(arm["ms"], base["ms"], strict=True)]


def markdown(result: dict[str, Any], figure: str = "") -> str:
    """The whole report."""
    copy, gemm = ceiling(result, "copy"), ceiling(result, "gemm")
    what = result["ceilings"][0]["gemm"]["what"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        f"# The loss kernels and their peers: {result['machine']}",
        f"`{result['command']}`, {result['date']}; {versions}; seed {result['seed']}.",
    ]
    if result["device"] == "cpu":
        parts.append("**Measured on a CPU, in float32. Nothing here says how any of these runs on a GPU.**")
        load, cores = result.get("load", (None, None))
        if load is None:
            parts.append("How busy the machine was with other programs was not recorded.")
        elif load > 1.2 * cores:
            parts.append(
                f"Other programs were running (load average up to {load:.1f} on {cores} cores): the ratios of arms that took "
                "turns say more than the times, and their quartiles how much."
            )
    if result["quick"]:
        parts.append("**--quick: shapes so small that the times mean nothing.**")
    parts.append(
        f"Ceilings of this machine, measured in the same run: copy {copy / 1e9:,.1f} GB/s (bytes read + written), product "
        f"{gemm / 1e12:,.3g} TFLOP/s ({what}, random numbers)."
    )
    parts += [_legend(result), _targets(result)]
    if figure:
        parts.append(f"![Time per arm and share of loss rows]({figure})")
    parts += [_case(result, case) for case in result["cases"]]
    if result["dropped"]:
        lines = "\n".join(f"- {item['name']}: {item['why']}" for item in result["dropped"])
        parts.append(f"## Cases that were not measured\n\n{lines}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _legend(result: dict[str, Any]) -> str:
    memory = (
        "the allocator's peak during a call less what was allocated when it began"
        if result["device"] == "cuda"
        else "the process's resident peak during a call less what was resident when it began"
    )
    return (
        "Times are of one call: median (quartiles) of rounds in which the arms take turns. Ratios are taken round by round "
        "against the fastest of ours. TFLOP/s count 6nVH with gradients and 2nVH without, n being the rows that carry loss, "
        f"whatever an arm computes. Extra memory is {memory}; gradients that are returned are part of it. Every arm was "
        "checked against float64 on these tensors: its worst error is given as a share of the bound. *Inexact* arms do "
        "less than ours by their own choice and have a wider bound."
    )


def _case(result: dict[str, Any], case: dict[str, Any]) -> str:
    width = f", H = {case['hidden']:,}" if case["hidden"] else ""
    share = f", {case['loss_rows']:,} of them with loss" if case["loss_rows"] != case["rows"] else ""
    weights = "uniform weights" if case["weights"] == "uniform" else "token weights"
    title = f"## {case['title'].capitalize()}: N = {case['rows']:,}{share}{width}, V = {case['vocabulary']:,}"
    title += f", {case['dtype']}, {weights}"
    if case["sweep"]:
        title += f" (sweep: {case['share']:.0%} loss rows)"
    arms = measured(case)
    lines = []
    if arms:
        given = bool(case["floor_bytes"])
        lines.append(
            f"Floor: {short(floor_ms(result, case))} ms ({'one read + one write' if given else 'the products'}).\n"
        )
        rate = "GB/s by one read + one write | of the copy ceiling" if given else "TFLOP/s | of the product ceiling"
        lines.append(
            f"| arm | ms | {rate} | / fastest of ours | extra MiB | error / bound | dWeight summed in | computes |"
        )
        lines.append("|---|--:|--:|--:|--:|--:|--:|---|---|")
        base = next(iter(measured(case, ours=True)), None)
        lines += [_row(result, case, arm, base) for arm in arms]
    for arm in case["arms"]:
        if arm["refused"]:
            lines.append(f"\nrefused: {arm['name']}: {arm['refused']}")
    absent: dict[str, list[str]] = {}
    for arm in case["arms"]:
        if arm["not_run"]:
            absent.setdefault(arm["not_run"], []).append(arm["name"])
    if absent:
        lines.append("\n" + "\n".join(f"- not run: {'; '.join(names)}: {why}" for why, names in absent.items()))
    return title + "\n\n" + "\n".join(lines)


def short(value: float) -> str:
    """Three digits, or all of a large number's before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _row(result: dict[str, Any], case: dict[str, Any], arm: dict[str, Any], base: dict[str, Any] | None) -> str:
    low, middle, high = quartiles(arm["ms"])
    if case["floor_bytes"]:
        rate, top, unit = case["floor_bytes"] / (1e-3 * middle), ceiling(result, "copy"), 1e9
    else:
        rate, top, unit = case["operations"] / (1e-3 * middle), ceiling(result, "gemm"), 1e12
    extra = arm["peak_extra_bytes"]
    a, b, c = quartiles(ratios(arm, base)) if base is not None else (float("nan"),) * 3
    worst = max((arm["errors"][name] / bound for name, bound in arm["bounds"].items()), default=float("nan"))
    computes = arm["computes"] + (f"; *inexact: {arm['inexact']}*" if arm["inexact"] else "")
    cells = [
        f"**{arm['name']}**" if arm["ours"] else arm["name"],
        f"{short(middle)} ({short(low)}-{short(high)})",
        f"{rate / unit:,.3g}",
        f"{rate / top:.0%}",
        f"{b:.2f}x ({a:.2f}-{c:.2f})",
        "-" if extra is None else f"{extra / MIB:,.0f}",
        f"{worst:.2f}",
        arm["sums"] if case["operation"] == "fused" else "-",
        computes,
    ]
    return "| " + " | ".join(cells) + " |"


def _targets(result: dict[str, Any]) -> str:
    """What the project set out to reach on one H200, and what this run found; only of a GPU."""
    if result["device"] != "cuda" or result["quick"]:
        return ""
    lines = [
        _fused_target(result),
        *(_logits_target(result, impl, wanted) for impl, wanted in (("cuda", 1.15), ("triton", 1.7))),
        _logprob_target(result),
        _share_target(result),
    ]
    rows = "\n".join(f"| {name} | {wanted} | {found} |" for name, wanted, found in lines)
    return f"## Targets\n\n| what | wanted | found |\n|---|---|---|\n{rows}"


def _find(result: dict[str, Any], operation: str, share: float = 1.0, rows: int = 8192) -> dict[str, Any] | None:
    for case in result["cases"]:
        shape = (case["operation"], case["rows"], case["vocabulary"], case["weights"], case["share"])
        if shape == (operation, rows, LARGE, "uniform", share) and case["hidden"] in (0, 4096):
            return case
    return None


def _verdict(met: bool, text: str) -> str:
    return f"{'**met**' if met else 'not met'}: {text}"


def _ours(case: dict[str, Any] | None) -> dict[str, Any] | None:
    return next(iter(measured(case, ours=True)), None) if case else None


def _full_sums(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Peers that sum dWeight in float32 as ours do, fastest first; a loss rounded to bfloat16 does not excuse them."""
    return [arm for arm in measured(case, ours=False) if arm["sums"] != "bf16"]


def _fused_target(result: dict[str, Any]) -> tuple[str, str, str]:
    name, wanted = (
        "linear-fused, forward + backward, N = 8,192, H = 4,096",
        "88% of the product ceiling, at most 1 GiB + fp32 dWeight beside the gradients, faster than every peer with fp32 dWeight",
    )
    case = _find(result, "fused")
    arm = _ours(case)
    if case is None or arm is None:
        return name, wanted, "not measured"
    share = floor_ms(result, case) / quartiles(arm["ms"])[1]
    allowed = GIB + 4 * case["vocabulary"] * case["hidden"]
    extra = (arm["peak_extra_bytes"] or 0) - case["gradient_bytes"]
    peers = _full_sums(case)
    lead = quartiles(ratios(peers[0], arm))[1] if peers else float("inf")
    text = f"{arm['name']}: {share:.1%}, {extra / MIB:,.0f} of {allowed / MIB:,.0f} MiB, "
    text += f"{peers[0]['name']} takes {lead:.2f}x" if peers else "no such peer ran"
    return name, wanted, _verdict(share >= 0.88 and extra <= allowed and lead > 1, text)


def _logits_target(result: dict[str, Any], impl: str, limit: float) -> tuple[str, str, str]:
    name, wanted = f"given logits, {impl}", f"within {limit}x of one read + one write"
    case = _find(result, "logits")
    arms = [arm for arm in measured(case, ours=True) if arm["name"].startswith(f"ours, {impl}")] if case else []
    if case is None or not arms:
        return name, wanted, "not measured"
    times = quartiles(arms[0]["ms"])[1] / floor_ms(result, case)
    return name, wanted, _verdict(times <= limit, f"{times:.2f}x")


def _logprob_target(result: dict[str, Any]) -> tuple[str, str, str]:
    name, wanted = "`linear_logprob`, N = 8,192, H = 4,096", "87% of the product ceiling by 2NVH"
    case = _find(result, "logprob")
    arm = _ours(case)
    if case is None or arm is None:
        return name, wanted, "not measured"
    share = floor_ms(result, case) / quartiles(arm["ms"])[1]
    return name, wanted, _verdict(share >= 0.87, f"{arm['name']}: {share:.1%}")


def _share_target(result: dict[str, Any]) -> tuple[str, str, str]:
    name, wanted = "10% loss rows of 65,536", "8x faster than the same peer over all rows"
    case = _find(result, "fused", share=0.10, rows=65_536)
    arm = _ours(case)
    peers = _full_sums(case) if case else []
    if arm is None or not peers:
        return name, wanted, "not measured"
    lead = quartiles(ratios(peers[0], arm))[1]
    return name, wanted, _verdict(lead >= 8, f"{peers[0]['name']} takes {lead:.1f}x of {arm['name']}")
