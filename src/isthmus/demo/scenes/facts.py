"""True statements about a scene, each naming a thing by one attribute and then telling all the others.

Captions go through a picture in reading order, so whoever writes them never has to find a thing by what it looks
like; short questions ask for just that, but teach a single word in a dozen. Statements in any order are the step
between: ``the cube is large and red at the top left.`` Nearly every word after the first few must be looked up.
"""

from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.questions import only
from isthmus.demo.scenes.scene import Scene


def facts(scene: Scene, dice: Dice, count: int = 8) -> str:
    """At most ``count`` different statements in any order, one for each attribute that one solid alone has."""
    statements = [f"the thing at the {s.place} is a {s.full_name}." for s in scene.solids]
    for s in scene.solids:
        if only(scene, shape=s.shape):
            statements.append(f"the {s.shape} is {s.size} and {s.colour} at the {s.place}.")
        if only(scene, colour=s.colour):
            statements.append(f"the {s.colour} thing is a {s.size} {s.shape} at the {s.place}.")
    return " ".join(dice.shuffled(statements)[:count])
