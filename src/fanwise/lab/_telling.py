"""A schedule told to people: as text, and as a sequence diagram (Mermaid)."""

from itertools import groupby

from ._follow import Followed
from ._result import Result
from ._scenario import Design
from ._schedule import LETTERS, render


def tell(design: Design, done: Followed) -> str:
    """Return a schedule as text: a line for each step, what was noted, and what broke."""
    lines = [f"{design.name} {render(done.picks)}"]
    used = sorted({step.task for step in done.trace})
    width = max((len(done.names[task]) for task in used), default=0)
    for number, step in enumerate(done.trace, start=1):
        who = f"{LETTERS[step.task]} {done.names[step.task]:<{width}}"
        lines.append(f"{number:4}  {who}  {step.step}")
        lines += [f"{'':6}{'':{width + 2}}  - {note}" for note in step.notes]
    if done.broken is not None:
        prop = done.broken.property
        lines.append(f"breaks {prop}: {design.sentence(prop)}")
        if done.broken.seen:
            lines += [f"       {part}" for part in done.broken.seen.split("; ")]
    elif done.ended:
        lines.append("ends, and nothing broke")
    else:
        lines.append("stops here: the schedule ends before its tasks do")
    return "\n".join(lines) + "\n"


def draw(design: Design, done: Followed) -> str:
    """Return a schedule as the text of a Mermaid sequence diagram."""
    lines = ["sequenceDiagram"]
    used = sorted({step.task for step in done.trace})
    for task in used:
        lines.append(f"    participant {LETTERS[task]} as {_safe(done.names[task])}")
    for task, steps in groupby(done.trace, key=lambda step: step.task):
        texts = []
        for step in steps:
            texts.append(_safe(step.step))
            texts += [f"({_safe(note)})" for note in step.notes]
        lines.append(f"    Note over {LETTERS[task]}: {'<br/>'.join(texts)}")
    if done.broken is not None and used:
        over = LETTERS[used[0]] + (f",{LETTERS[used[-1]]}" if len(used) > 1 else "")
        seen = f"<br/>{_safe(done.broken.seen)}" if done.broken.seen else ""
        lines.append(f"    Note over {over}: breaks {done.broken.property}{seen}")
    return "\n".join(lines) + "\n"


def summary(result: Result) -> str:
    """Return a result as a few lines of text."""
    bounds = result.bounds
    lines = [f"{result.scenario}/{result.design}: {result.verdict}"]
    if result.property is not None:
        lines[0] += f" {result.property} by {result.schedule}"
        if result.seen:
            lines += [f"  {part}" for part in result.seen.split("; ")]
    if bounds.sampled is not None:
        within = f"{bounds.sampled} schedules drawn"
    elif bounds.preemptions is None:
        within = "any number of preemptions"
    else:
        within = f"up to {bounds.preemptions} preemptions"
    ran = f"{result.schedules} schedules, {result.steps} steps"
    if result.reduced:
        ran += f", {result.states} states"
    lines.append(f"  {within}: {ran}")
    if result.verdict == "sampled" and bounds.sampled is None:
        lines.append("  not all of it was covered: a limit on steps or time was reached")
    if result.not_keyed:
        lines.append(f"  run without pruning: {result.not_keyed}")
    for name, (low, high) in sorted(result.counts.items()):
        lines.append(f"  {name}: {low if low == high else f'{low} to {high}'}")
    for place, cases in sorted(result.cases.items()):
        lines.append(f"  {place}: {len(cases)} cases: {', '.join(cases)}")
    return "\n".join(lines) + "\n"


# A semicolon ends a statement of Mermaid, # begins an entity, < a tag.
def _safe(text: str) -> str:
    table = {"#": "#35;", "<": "#lt;", ">": "#gt;", ";": "#59;", "\n": " "}
    return "".join(table.get(char, char) for char in text)
