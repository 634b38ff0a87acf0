"""How much memory do very many objects take, written as GeoJSON and read again?

Nuclei of sixteen corners each, in two classes with a measurement, go to a file as they come, and come back one by one
(``wsi.geojson_stream.GeoJsonStream``); beside that the whole file at once, as ``json.load`` has it. Each is done in a process
of its own. Growth is what the process holds at its peak beyond what it held before; writing remembers the
id of each object.

    python benchmarks/objects.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from figures import Figure, parser, report

ROOT = Path(__file__).resolve().parents[1]
MANY = 300_000
QUICK = 30_000
MOST_MB = 100.0
RUN = """
import gzip, json, math, sys, time
from pathlib import Path
import shapely
from features.timing import peak_memory_bytes
from wsi.annotation import Annotation
from wsi.geojson import Frame, write_geojson
from wsi.geojson_stream import GeoJsonStream

path, step, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
CORNERS = [(math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16)]
WIDE = 600

def nucleus(number):
    x, y, r = 20 * (number % WIDE) + 10, 20 * (number // WIDE) + 10, 6 + number % 3
    shape = shapely.Polygon([(round(x + r * a, 2), round(y + r * b, 2)) for a, b in CORNERS])
    return Annotation(shape, ("tumour", "stroma")[number % 2], measurements={"Area µm^2": shape.area / 16})

before, began = peak_memory_bytes(), time.perf_counter()
if step == "write":
    frame = Frame("many", (20 * WIDE, 20 * (n // WIDE + 1)), (0.25, 0.25))
    done = write_geojson(path, (nucleus(number) for number in range(n)), frame).n_written
elif step == "read":
    done = sum(each.geometry.equals(nucleus(number).geometry) for number, each in enumerate(GeoJsonStream(path)))
else:
    with gzip.open(path) as file:
        done = len(json.load(file)["features"])
print(done, time.perf_counter() - began, (peak_memory_bytes() - before) / 1e6)
"""


def measured(path: Path, step: str, n: int) -> tuple[int, float, float]:
    """Objects done, seconds, and megabytes of growth."""
    words = [sys.executable, "-c", RUN, str(path), step, str(n)]
    said = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return int(said[0]), float(said[1]), float(said[2])


def main() -> None:
    chosen = parser(__doc__).parse_args()
    most = QUICK if chosen.quick else MANY
    figures: list[Figure] = []
    grown: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for n in (most // 10, most):
            path = Path(temporary) / f"{n}.geojson.gz"
            for step, words in (("write", "written"), ("read", "read one by one"), ("load", "json.load, whole")):
                done, seconds, grown[step, n] = measured(path, step, n)
                if done != n:
                    raise SystemExit(f"{step}: {done} of {n} objects")
                reach = MOST_MB if n == MANY and step != "load" else None
                figures += [
                    Figure(f"{n} objects, {words}", seconds, "s"),
                    Figure(f"{n} objects, {words}: growth", grown[step, n], "MB", reach, False),
                ]
    for step in ("write", "read"):
        ratio = grown[step, most] / max(grown[step, most // 10], 1.0)
        figures.append(Figure(f"{step}: growth with ten times the objects", ratio, "x"))
    ratio = grown["load", most] / grown["read", most]
    figures.append(Figure("json.load holds, as often as the stream", ratio, "x"))
    report("Many objects as GeoJSON", figures, chosen.json)


if __name__ == "__main__":
    main()
