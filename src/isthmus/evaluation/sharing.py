"""The rows of an evaluation, made by several processes: each takes a run of neighbouring items.

What needs the vectors of all items (retrieval, zero-shot, a linear probe) is made by all together: they share the
encoding (:mod:`.embedding`), and each knows all rows.
"""

from collections.abc import Collection, Iterator

from isthmus.evaluation.outputs import R
from isthmus.evaluation.tasks import Task
from isthmus.processes import all_of, apart, rank, world_size


def shared_rows(task: Task[R], model: object, done: Collection[str], *, chunk: int) -> Iterator[list[R]]:
    """``task.rows``, some at a time, those of all processes in each. Every process makes the same number of turns,
    whatever items it has, and an error of one is raised by all."""
    task.prepare(model, chunk=chunk)
    if task.together:
        yield from task.rows(model, done, chunk=chunk)
        return
    todo = [name for name in task.ids if name not in done]
    share = -(-len(todo) // world_size())
    own = set(todo[rank() * share :][:share])
    stream = _apart(task, model, {name for name in task.ids if name not in own}, chunk) if own else iter(())
    while True:
        turn = all_of(lambda: next(stream, None))
        if all(made is None for made in turn):
            return
        yield [row for made in turn for row in made or ()]


def _apart(task: Task[R], model: object, done: Collection[str], chunk: int) -> Iterator[list[R]]:
    """The rows of a process that is the only one to the model."""
    stream = iter(task.rows(model, done, chunk=chunk))
    while True:
        with apart():
            made = next(stream, None)
        if made is None:
            return
        yield made
