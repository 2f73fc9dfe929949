"""The findings of a study in sentences, each with its noise, its seeds and its limits.

Two settings are told apart only where the 95 % interval of their difference, paired by held-out example, excludes zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_study.config import StudyConfig
from peft_study.report.results import Finalist, Results, Row
from peft_study.search import range_expansion
from peft_study.search.trials import Recommendation, StudyState, best_first
from peft_study.statistics import Estimate, about_sources, difference, few_examples, short
from peft_study.storage.held_out import HeldOut

FEW = 6
"""Settings that a sentence lists one by one; of more it gives the number."""


def sentences(config: StudyConfig, state: StudyState, examples: HeldOut, results: Results) -> list[str]:
    """Returns a sentence on the base, each method's search and finals, the winner, the pruning."""
    said = [f"untouched base: {_level(results.base_dev, results.dev_examples)})"]
    for method in results.methods:
        said.append(_search(config, state, examples, results, method))
        said += [_finals(f, results) for f in results.finalists if f.method == method][:1]
        said += [f"{_title(method)}: {note}" for note in results.notes.get(method, ())]
        if method in state.recommended:
            said.append(recommendation(method, state.recommended[method]))
        if state.settled(method, config):
            said.append(f"{_title(method)}: its search ended early, as known well enough (search.stop)")
    if results.finalists:
        said.append(_conclusion(config, results))
    if sum(len(group) for group in results.groups) > 1:
        said.append(ranking(results))
    if results.pruning.pruned or results.pruning.audited:
        said.append(_pruning(results))
    rows = [results.dev_examples, *([results.test_examples] if results.base_test is not None else [])]
    if note := few_examples(min(rows)):
        said.append(note)
    parts = (examples.counts_N, examples.test_counts_N)[: len(rows)]
    said += dict.fromkeys(note for part in parts if (note := about_sources(len(part), part.sources)))
    if results.deadline:
        said.append("the time limit ended the search before all its settings were tried")
    if results.stopped:
        said.append(f"the study was ended before its plan was done: {results.stopped}")
    if results.continued:
        said.append("the study file was changed during the study, and the test part opened more than once")
    return said


def recommendation(method: str, known: Recommendation) -> str:
    """Returns the setting that the model of a method's losses recommends, and how well it is known."""
    said = []
    for name, value in known.values.items():
        text = f"{name} {short(value)}"
        if name == "learning_rate" and known.rates is not None and known.rates[0] < known.rates[1]:
            text += f" (the best rate lies between {short(known.rates[0])} and {short(known.rates[1])})"
        said.append(text)
    within = f"within {known.within:.2g} nats a token of the best of its space, with 90 %"
    return f"{_title(method)}: recommended from all its trials: {', '.join(said)}; {within}"


def label(row: Row | Finalist, config: StudyConfig, method: str) -> str:
    """Returns what was searched with its values, named as in the study file."""
    names = list(config.methods[method].dimensions()) or ["learning_rate"]
    return ", ".join(f"{name} {short(row.settings[name])}" for name in names)


def _title(method: str) -> str:
    return method.replace("_", " ")


def _level(estimate: Estimate, examples: int) -> str:
    return f"dev loss {estimate.value:.3f} ({estimate.phrase()}, over {examples} examples"


def _search(config: StudyConfig, state: StudyState, examples: HeldOut, results: Results, method: str) -> str:
    own = [row for row in results.rows if row.trial.method == method and row.trial.kind == "search"]
    finished = best_first(row.trial for row in own)
    title = _title(method)
    if not own:
        return f"{title}: no trial began in the time allowed"
    if not finished:
        which = "its only setting did not finish" if len(own) == 1 else f"none of its {len(own)} settings finished"
        return f"{title}: {which} ({own[0].trial.reason})"
    best = next(row for row in own if row.trial is finished[0])
    assert best.dev is not None
    assert best.minus_base is not None
    rank = "the only setting tried" if len(own) == 1 else f"best of {len(own)} settings"
    level = _level(best.dev, results.dev_examples)
    text = f"{title}: {label(best, config, method)} is {rank}: {level}, one seed)"
    if len(own) > 1:
        edges = range_expansion.edges(best.trial.values, config.methods[method], state.bounds.get(method, {}))
        text += "".join(f"; {name} lies at the edge of its range: try {_way(edge)}" for name, edge in edges.items())
    if best.minus_base.low > 0:
        text += "; even so it is worse than the untouched base"
    elif not best.minus_base.excludes_zero():
        text += "; even so it cannot be told from the untouched base"
    if state.untuned(method, config):
        text += "; untuned: it had fewer trials than the others, so it is not ranked"
    return text + _others(config, examples, method, own, best)


def _way(edge: str) -> str:
    return "higher" if edge == "high" else "lower"


def _others(config: StudyConfig, examples: HeldOut, method: str, own: Sequence[Row], best: Row) -> str:
    """Sorts the other settings: as good within noise, no different from the base, worse than it, not finished."""
    found: dict[tuple[str, str], list[Row]] = {
        ("cannot be told from it",) * 2: [],
        ("cannot be told from the untouched base",) * 2: [],
        ("is worse than the untouched base", "are worse than the untouched base"): [],
        ("was stopped early", "were stopped early"): [],
        ("diverged",) * 2: [],
        ("failed",) * 2: [],
    }
    alike, idle, worse, pruned, diverged, failed = found.values()
    assert best.trial.last is not None
    for row in own:
        if row is best:
            continue
        if row.trial.status != "finished":
            {"pruned": pruned, "diverged": diverged}.get(row.trial.status, failed).append(row)
            continue
        assert row.trial.last is not None
        assert row.minus_base is not None
        if not difference(row.trial.last, best.trial.last, examples.counts_N).excludes_zero():
            alike.append(row)
        elif not row.minus_base.excludes_zero():
            idle.append(row)
        elif row.minus_base.low > 0:
            worse.append(row)
    bare = list(config.methods[method].dimensions()) == ["learning_rate"]
    text = ""
    for (one, several), members in found.items():
        if members:
            few = bare and len(members) <= FEW
            rates = [short(row.settings["learning_rate"]) for row in members]
            text += f"; {_list(rates) if few else _count(len(members))} {one if len(members) == 1 else several}"
    return text


def _count(number: int) -> str:
    return "1 other setting" if number == 1 else f"{number} other settings"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _finals(best: Finalist, results: Results) -> str:
    title = _title(best.method)
    seeds = len(best.dev_of_seeds)
    if best.dev is None or best.failed:
        failed = f"{best.failed} of {seeds + best.failed} seeds"
        return f"{title}: {failed} of its best setting did not finish, so it is not ranked"
    spread = f", by seed {min(best.dev_of_seeds):.3f} to {max(best.dev_of_seeds):.3f}" if seeds > 1 else ""
    text = f"{title}, its best setting retrained with {_seeds(seeds)}: dev loss {_mean(best.dev)}{spread}"
    if best.test is not None and best.test_minus_base is not None:
        text += f"; test loss {_mean(best.test)}, {_against_base(best.test_minus_base)}"
    return text


def _against_base(above: Estimate) -> str:
    if not above.excludes_zero():
        return f"which cannot be told from the untouched base's ({above.value:+.3f}, {above.phrase('+.3f')})"
    low, high = sorted((abs(above.low), abs(above.high)))
    side = "below" if above.value < 0 else "above"
    return f"{abs(above.value):.3f} (95 % {low:.3f} to {high:.3f}) {side} the untouched base's"


def _mean(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.phrase()})"


def _seeds(count: int) -> str:
    return "one new seed" if count == 1 else f"{count} new seeds"


def _conclusion(config: StudyConfig, results: Results) -> str:
    winner = next((f for f in results.finalists if f.winner), None)
    if winner is None:
        return "no setting finished with all its new seeds, so there is no winner"
    settings, seeds = label(winner, config, winner.method), len(winner.dev_of_seeds)
    text = f"winner by mean dev loss over {_seeds(seeds)}: {_title(winner.method)} with {settings}"
    group = next((group for group in results.groups if winner in group), ())
    close = [f for f in group if f.method != winner.method]
    if seeds < 3:
        text += "; fewer than 3 seeds: take it as a lead"
    if close:
        methods = list(dict.fromkeys(_title(f.method) for f in close))
        text += f"; on the {_part(results)} part {_list(methods)} cannot be told from it"
    if winner.test_minus_base is not None and winner.test_minus_base.low > 0:
        text += "; it is worse than the untouched base"
    return text


def _part(results: Results) -> str:
    return "test" if results.on_test else "dev"


def ranking(results: Results) -> str:
    """Returns the finalists best first, in groups that cannot be told apart."""
    names = [_list([_final_name(final, results) for final in group]) for group in results.groups]
    alike = [", which cannot be told apart" if len(group) > 1 else "" for group in results.groups]
    said = "; then ".join(name + more for name, more in zip(names, alike, strict=True))
    return f"ranking on the {_part(results)} part, corrected for all pairs (Holm): {said}{_smallest(results)}"


def _smallest(results: Results) -> str:
    if results.smallest is None:
        return ""
    count = results.test_examples if results.on_test else results.dev_examples
    now, later = results.smallest
    return (
        f"; with {count} examples, differences of the two best under {now:.2g} nats a token are easily missed (80 % "
        f"power, seeds apart); {4 * count} would show {later:.2g}"
    )


def _final_name(final: Finalist, results: Results) -> str:
    several = sum(other.method == final.method for group in results.groups for other in group) > 1
    return f"{final.method}-{final.number:03d}" if several else _title(final.method)


def cost(results: Results) -> str:
    """Returns what each method's trials were trained on."""
    spent = [f"{_title(method)} {results.tokens[method]:,}" for method in results.methods]
    return f"data tokens trained on, range tests and finals included: {', '.join(spent)}"


def _pruning(results: Results) -> str:
    pruning = results.pruning
    text = "1 trial was stopped early" if pruning.pruned == 1 else f"{pruning.pruned} trials were stopped early"
    if not pruning.audited:
        return f"{text}; none was run on to check that"
    more = (
        "1 more met the rule but was kept as a control"
        if pruning.audited == 1
        else (f"{pruning.audited} more met the rule but were kept as controls")
    )
    share = f"{pruning.wrong} of {pruning.audited}" if pruning.wrong else "none"
    return f"{text}; {more}: {share} would have been a finalist"
