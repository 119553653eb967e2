"""A picture of what reuse disturbs, against what it computes again: SVG, without a library."""

from __future__ import annotations

CURVES = {  # arms that begin with this: (how it is told of, its colour)
    "reuse + first": ("first k of each (EPIC)", "#b3541e"),
    "reuse + value": ("value deviation (CacheBlend)", "#5b7fa6"),
    "reuse + asked": ("what the question attends to", "#7aa88f"),
    "led + asked": ("the same, computed behind a lead (ours)", "#1d7a4f"),
    "led alike + asked": ("behind a lead like the documents", "#0b3d91"),
}


def picture(rows: list[dict]) -> str:
    """KL against the share computed again, a panel for each set; other orders as dashed lines."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    width, height, left, top = 380, 260, 56, 40
    most = 1.1 * max(row["kl"][0] for row in rows if row["arm"] in ("reuse", "random", "planned"))
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(sets) * (width + 90)}" height="{height + 190}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for which, of in enumerate(sets):
        x0 = left + which * (width + 90)

        def at(share: float, kl: float, x0: int = x0) -> str:
            return f"{x0 + width * share / 0.5:.1f},{top + height * (1 - kl / most):.1f}"

        found = {row["arm"]: row for row in rows if row["set"] == of}
        drawn.append(f'<text x="{x0}" y="{top - 14}" font-weight="bold">{of}</text>')
        drawn.append(f'<path d="M{at(0, most)} L{at(0, 0)} L{at(0.5, 0)}" fill="none" stroke="#333"/>')
        for share in (0, 0.1, 0.2, 0.3, 0.4, 0.5):
            x, y = at(share, 0).split(",")
            drawn.append(f'<text x="{x}" y="{float(y) + 16:.1f}" text-anchor="middle">{share:.0%}</text>')
        step = 0.05 if most < 0.4 else 0.1
        for tick in range(int(most / step) + 1):
            x, y = at(0, tick * step).split(",")
            drawn.append(
                f'<text x="{float(x) - 6:.1f}" y="{float(y) + 4:.1f}" text-anchor="end">{tick * step:.2f}</text>'
            )
        for name, where in (("random", 0.5), ("planned", 0.38)):  # their labels beside each other
            if name in found:
                kl = found[name]["kl"][0]
                x, y = at(where, kl).split(",")
                drawn.append(f'<path d="M{at(0, kl)} L{at(0.5, kl)}" stroke="#777" stroke-dasharray="4 3"/>')
                drawn.append(f'<text x="{x}" y="{float(y) - 4:.1f}" text-anchor="end" fill="#555">{name} order</text>')
        for begins, (_, colour) in CURVES.items():
            kind = begins.split(" +")[0]
            drawn_of = [row for arm, row in found.items() if arm == kind or arm.startswith(begins)]
            points = sorted((row["recomputed"], row["kl"][0]) for row in drawn_of if row["recomputed"] < 0.51)
            drawn.append(
                f'<path d="M{" L".join(at(*p) for p in points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
            for p in points:
                x, y = at(*p).split(",")
                drawn.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        x, y = at(0.25, 0).split(",")
        drawn.append(
            f'<text x="{x}" y="{float(y) + 36:.1f}" text-anchor="middle">documents\' tokens computed again</text>'
        )
    for i, (told, colour) in enumerate(CURVES.values()):
        y = top + height + 62 + 18 * i
        drawn.append(f'<path d="M{left},{y - 4} h22" stroke="{colour}" stroke-width="2"/>')
        drawn.append(f'<text x="{left + 30}" y="{y}">{told}</text>')
    drawn.append(f'<text x="4" y="{top - 14}">KL, nats</text></svg>')
    return "\n".join(drawn) + "\n"
