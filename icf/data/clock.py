"""The clock of a recording: what its time stamps lack to run on from the first packet to the last.

Recordings that were joined (`cat a.ts b.ts`), cut or begun anew hold time stamps that go back, or jump ahead by hours.
As FFmpeg's own players do, such a jump is closed: what follows begins where all tracks before it end.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import av

BACK = Fraction(1, 4)  # seconds: smaller steps back are single wrong stamps, no clock that was set anew
AHEAD = Fraction(10)  # seconds: shorter gaps are believed (FFmpeg's `-dts_delta_threshold`)
LONGEST = 24 * 3600  # seconds, beyond which time stamps are not believed
ALIKE = Fraction(2)  # seconds by which the jumps of two tracks may differ that are one jump of their clock
UNBROKEN = ("mov,mp4,m4a,3gp,3g2,mj2", "wav", "flac")  # stamps are sums of durations: they cannot jump


class Jump(NamedTuple):
    """A packet whose stamp does not follow from the one before it in its track.

    Args:
        track: its index in the file.
        number: of the packet within the track; 0: its first one, behind jumps of other tracks.
        time: when it is shown.
        by: seconds its stamp is ahead of what would follow.
        ends: where each track, as it is shown, ended before it.
    """

    track: int
    number: int
    time: Fraction
    by: Fraction
    ends: dict[int, Fraction]


@dataclass(frozen=True)
class Clock:
    """What is added to the stamps of each track: (from which of its packets on, seconds)."""

    shifts: dict[int, list[tuple[int, Fraction]]] = field(default_factory=dict)

    def packets(self, container, track: av.stream.Stream) -> Iterator[av.Packet]:
        """The packets of a track, their stamps set right; the last one is empty, for the decoder."""
        shifts = dict(self.shifts.get(track.index, ()))
        ticks = 0
        for number, packet in enumerate(container.demux(track)):
            if number in shifts:
                ticks = round(shifts[number] / track.time_base)
            if ticks and packet.dts is not None:
                packet.dts += ticks
            if ticks and packet.pts is not None:
                packet.pts += ticks
            yield packet


@lru_cache(maxsize=8)
def _read(path: Path, size: int, changed: int) -> Clock:
    with av.open(f"file:{path}") as container:
        if container.format.name in UNBROKEN:
            return Clock()
        return Clock(_shifts(_jumps(container)))


def read_clock(path: Path) -> Clock:
    """The clock of a file, whose packets are gone through once, undecoded. FFmpeg's errors pass as they are."""
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


def _jumps(container) -> list[Jump]:
    """Jumps in the order of the file, each with those of other tracks that are the same."""
    due: dict[int, Fraction] = {}  # by the stamps of decoding, which go back and forth in no track
    ends: dict[int, Fraction] = {}
    numbers: dict[int, int] = {}
    found: list[Jump] = []
    for packet in container.demux(*container.streams.video, *container.streams.audio):
        track, number = packet.stream_index, numbers.get(packet.stream_index, 0)
        numbers[track] = number + 1
        if packet.dts is None:
            continue
        stamp, shown = (x * Fraction(packet.time_base) for x in (packet.dts, packet.pts or packet.dts))
        length = (packet.duration or 0) * Fraction(packet.time_base)
        by = stamp - due.get(track, stamp)
        if by < -BACK or AHEAD < by < LONGEST or (number == 0 and found):
            found.append(Jump(track, number, shown, by, dict(ends)))
            ends[track] = shown
        due[track], ends[track] = stamp + length, max(ends.get(track, shown), shown + length)
    return [jump for jump in found if jump.by <= AHEAD or all(
        any(other.track == track and abs(other.by - jump.by) < ALIKE for other in found) for track in due)]


def _shifts(jumps: list[Jump]) -> dict[int, list[tuple[int, Fraction]]]:
    """The n-th jump of every track leads to the n-th piece, which begins where all tracks of the one before it end."""
    pieces, place, shifts = [Fraction(0)], {}, {}
    for jump in jumps:
        piece = place.get(jump.track, 0) + 1 if jump.number else len(pieces) - 1
        if piece == len(pieces):
            front = max(end + pieces[place.get(track, 0)] for track, end in jump.ends.items())
            pieces.append(front - jump.time)
        place[jump.track] = piece
        shifts.setdefault(jump.track, []).append((jump.number, pieces[piece]))
    return shifts
