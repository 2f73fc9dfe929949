"""Tasks on what a study has trained, on the base that its session has loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_study.config import EvaluationConfig, MethodConfig
from peft_study.evaluation.evaluate import Evaluation
from peft_study.evaluation.systems import System
from peft_study.methods.peft_format import load_adapter
from peft_study.methods.reference import NoAdapter
from peft_study.methods.registry import is_exclusive
from peft_study.model.in_memory import lent
from peft_study.storage.run_dir import RunFolder
from peft_study.training.answers import whole_model
from peft_study.training.session import Session, unheard


def evaluate_trained(
    session: Session, config: EvaluationConfig, folder: Path, trained: Sequence[tuple[str, MethodConfig, Path]]
) -> None:
    """Asks the untouched base and what was trained the tasks, or goes on where an earlier call was stopped.

    Args:
        session: of the study; no trial is in its engine.
        config: which tasks.
        folder: of every output.
        trained: name, setting and adapter folder of each; of a method that trains all weights the model's folder.

    Raises:
        UserError: as `Evaluation`.
    """
    evaluation = Evaluation(folder, config)
    base, encoder = session.base, session.encoder
    with RunFolder(folder).locked(), lent(base.model):
        own = [(name, path) for name, method, path in trained if not is_exclusive(method.method)]
        systems = [System(name, load_adapter(path, base), encoder, path) for name, path in own]
        evaluation.run(base, [*evaluation.of_base(encoder), *systems], unheard)
        for name, method, path in trained:
            if is_exclusive(method.method):
                with whole_model(session, method, path):
                    evaluation.run(base, [System(name, NoAdapter(), encoder, path)], unheard)
        evaluation.result()
