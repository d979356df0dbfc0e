// Curves of runs: read, smoothed, averaged over the runs of a group, and summarised.

const COLOURS = 8;

// A run's curve as {xs, ys}; null if the run does not have it.
function readCurve(run, name) {
  const curve = run.series.curves[name];
  return curve ? { xs: run.series.axes[curve[0]], ys: curve[1] } : null;
}

// The moving mean over `width` neighbouring points, which ends at each point; missing values are left out.
function smooth(ys, width) {
  if (width <= 1) return ys;
  return ys.map((value, index) => {
    if (value === null) return null;
    let sum = 0;
    let count = 0;
    for (let i = Math.max(0, index - width + 1); i <= index; i++) {
      if (ys[i] !== null) {
        sum += ys[i];
        count++;
      }
    }
    return sum / count;
  });
}

// The mean of several curves at the steps that all of them have; null if there is none.
function averageCurves(curves) {
  const [first, ...others] = curves;
  const maps = others.map((curve) => new Map(curve.xs.map((x, i) => [x, curve.ys[i]])));
  const xs = [];
  const ys = [];
  first.xs.forEach((x, index) => {
    const values = [first.ys[index], ...maps.map((map) => map.get(x))];
    if (values.every((value) => value !== null && value !== undefined)) {
      xs.push(x);
      ys.push(values.reduce((a, b) => a + b, 0) / values.length);
    }
  });
  return xs.length ? { xs, ys } : null;
}

// Round steps of an axis from low to high, about `count` of them.
function chooseTicks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const ticks = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) {
    ticks.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  }
  return ticks;
}

function lastValue(ys) {
  for (let i = ys.length - 1; i >= 0; i--) if (ys[i] !== null) return ys[i];
  return null;
}
