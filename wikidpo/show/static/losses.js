// The losses of wikidpo.core.loss in the browser, with the same names.
// Each is a function of the margin z (nats); label_smoothing > 0 makes dpo into cDPO, and belongs to robust.

const softplus = x => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const sigmoid = x => x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x));

export const loss = (z, beta, loss_type, label_smoothing) => loss_type == "ipo" ? (z - 1 / (2 * beta)) ** 2
  : loss_type == "hinge" ? Math.max(0, 1 - beta * z)
  : loss_type == "robust" ? ((1 - label_smoothing) * softplus(-beta * z) - label_smoothing * softplus(beta * z)) / (1 - 2 * label_smoothing)
  : (1 - label_smoothing) * softplus(-beta * z) + label_smoothing * softplus(beta * z);

// The share of its full pull that a pair still has; for ipo, whose pull has no bound, of the pull that it has at z = 0
export const pull = (z, beta, loss_type, label_smoothing) => loss_type == "ipo" ? 1 - 2 * beta * z
  : loss_type == "hinge" ? +(beta * z < 1)
  : loss_type == "robust" ? sigmoid(-beta * z) + label_smoothing / (1 - 2 * label_smoothing)
  : sigmoid(-beta * z) - label_smoothing;

export const slope = (z, beta, loss_type, label_smoothing) =>
  -(loss_type == "ipo" ? 1 / beta : beta) * pull(z, beta, loss_type, label_smoothing);

const RETIRED = .05; // a pair with less than this share of the pull with which it began has retired

export const hasRetired = (z, ...settings) => Math.abs(pull(z, ...settings)) < RETIRED * pull(0, ...settings);

export const summary = (zs, beta, loss_type, label_smoothing) => {
  let retired = 0, sum = 0;
  for (const z of zs) {
    retired += hasRetired(z, beta, loss_type, label_smoothing);
    sum += pull(z, beta, loss_type, label_smoothing);
  }
  return { retired, mean: sum / zs.length };
};
