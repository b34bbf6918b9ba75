"""The toy benchmark: moving shapes with a timbre each, written in the layouts of AVSBench, quirks included.

It carries the problem of the paper in small. One shape of every clip is salient: large, of strong contrast and fast. In
the training and validation splits it is nearly always the salient shape that sounds, in the test split it is so by
chance only; a model that ignores the sound and segments what stands out does well on the one and badly on the other.

Quirks on purpose, which `icf data check` reports: in every split one sound ends early, one is stereo, one at 44.1 kHz,
and one folder of labels holds a `.DS_Store`; the rest of a shape that another one hides may be a stray component.

Every clip is drawn from (seed, source, split, index) alone, so that neither the order nor the number of processes
matters. A source is what a clip is made like: `s4` (one shape sounds throughout), `ms3` (several sound, with pauses and
sounds from off the screen) or `v2` (the same for 10 s). AVSS holds clips of all three, as AVSBench-semantic does.
"""
from icf.data.toy.files import ensure, generate, load_manifest
from icf.data.toy.scene import CLASSES, FOLDERS

__all__ = ["CLASSES", "FOLDERS", "ensure", "generate", "load_manifest"]
