/* Functions of vectors, over the vector_*.h that was included before. */

#ifndef EDGEVLM_VECTOR_FUNCTIONS_H
#define EDGEVLM_VECTOR_FUNCTIONS_H

/* 2^x for x up to about 100, right to 2e-7; 0 below -125. */
OF_FORM INLINE vector power_of_two(vector x) {
  vector whole, part = split(x, &whole);
  vector y = times_plus(all(1.3333558e-3f), part, all(9.6181291e-3f));
  y = times_plus(y, part, all(5.5504109e-2f));
  y = times_plus(y, part, all(2.4022651e-1f));
  y = times_plus(y, part, all(6.9314718e-1f));
  y = times_plus(y, part, all(1.0f));
  return shifted(y, whole);
}

/* e^x for x up to 0. */
OF_FORM INLINE vector exponential(vector x) { return power_of_two(times(x, all(1.44269504f))); }

/* x * sigmoid(z), z of x's sign: of e^-|z|, which cannot overflow. */
OF_FORM INLINE vector gated(vector x, vector z) {
  vector e = exponential(minus(all(0.0f), magnitude(z)));
  vector above = by_sign(z, e, all(1.0f));
  return times(x, times(above, reciprocal(plus(all(1.0f), e))));
}

OF_FORM INLINE vector silu(vector x) { return gated(x, x); }

/* x * Phi(x), with Abramowitz and Stegun's 7.1.26 for erf, right to 1.5e-7. */
OF_FORM INLINE vector gelu(vector x) {
  vector z = times(magnitude(x), all(0.70710678f));
  vector t = reciprocal(times_plus(z, all(0.3275911f), all(1.0f)));
  vector y = times_plus(all(1.061405429f), t, all(-1.453152027f));
  y = times_plus(y, t, all(1.421413741f));
  y = times_plus(y, t, all(-0.284496736f));
  y = times_plus(y, t, all(0.254829592f));
  vector e = exponential(minus(all(0.0f), times(z, z)));
  y = times(times(y, t), e); /* 1 - erf(z) */
  vector twice = by_sign(x, y, minus(all(2.0f), y));
  return times(times(x, all(0.5f)), twice);
}

OF_FORM INLINE vector gelu_tanh(vector x) {
  vector cubed = times(times(times(x, x), x), all(0.044715f));
  return gated(x, times(plus(cubed, x), all(1.59576912f)));
}

#endif
