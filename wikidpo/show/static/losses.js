// The losses of wikidpo.loss in the browser. Each is a function of the margin z (nats); smoothing > 0 makes dpo into cDPO.

const softplus = x => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const sigmoid = x => x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x));

export const loss = (z, beta, kind, smoothing) => kind == "ipo" ? (z - 1 / (2 * beta)) ** 2
  : kind == "hinge" ? Math.max(0, 1 - beta * z)
  : (1 - smoothing) * softplus(-beta * z) + smoothing * softplus(beta * z);

// The share of its full pull that a pair still has; for ipo, whose pull has no bound, of the pull that it has at z = 0
export const weight = (z, beta, kind, smoothing) => kind == "ipo" ? 1 - 2 * beta * z
  : kind == "hinge" ? +(beta * z < 1)
  : sigmoid(-beta * z) - smoothing;

export const slope = (z, beta, kind, smoothing) => -(kind == "ipo" ? 1 / beta : beta) * weight(z, beta, kind, smoothing);
const RETIRED = .05; // a pair with less than this share of its pull, in either direction, has retired

export const summary = (zs, beta, kind, smoothing) => {
  let retired = 0, sum = 0;
  for (const z of zs) { const w = weight(z, beta, kind, smoothing); retired += Math.abs(w) < RETIRED; sum += w; }
  return { retired, mean: sum / zs.length };
};
