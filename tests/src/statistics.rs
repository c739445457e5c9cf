//! Is a spread as even as chance allows?

/// Below this probability a spread is taken for uneven: one false alarm in a million runs.
pub const IMPLAUSIBLE: f64 = 1e-6;

/// Pearson's test of counts against "all equally likely": the probability that chance alone spreads at least this
/// unevenly. 1 for fewer than two counts.
#[must_use]
pub fn chi_squared(counts: &[u64]) -> f64 {
    let counts: Vec<f64> = counts.iter().map(|count| to_float(*count)).collect();
    let kinds = to_float(counts.len() as u64);
    let expected = counts.iter().sum::<f64>() / kinds;
    if counts.len() < 2 || expected == 0.0 {
        return 1.0;
    }
    let statistic: f64 = counts.iter().map(|count| (count - expected).powi(2) / expected).sum();
    upper_gamma((kinds - 1.0) / 2.0, statistic / 2.0)
}

/// Fails unless `counts` are as even as chance allows.
///
/// # Panics
///
/// When the spread is implausible.
pub fn assert_even(what: &str, counts: &[u64]) {
    let p = chi_squared(counts);
    assert!(p >= IMPLAUSIBLE, "{what} is spread unevenly: {counts:?} (chi-squared test: p = {p:.2e})");
}

fn to_float(count: u64) -> f64 {
    // Exact up to 2^53; no test counts that far.
    count as f64
}

/// The regularised upper incomplete gamma function Q(a, x) for a > 0, x >= 0, to about 14 digits.
fn upper_gamma(a: f64, x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    // What both expansions have in common: x^a e^-x / Gamma(a), in logarithms since its parts overflow.
    let scale = (a * x.ln() - x - ln_gamma(a)).exp();
    if x < a + 1.0 { 1.0 - scale * lower_series(a, x) } else { scale * upper_fraction(a, x) }
}

/// The power series of the lower incomplete gamma function, which converges fast for x < a + 1.
fn lower_series(a: f64, x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (1.0 / a, 1.0 / a, a);
    while term > sum * f64::EPSILON {
        n += 1.0;
        term *= x / n;
        sum += term;
    }
    sum
}

/// The continued fraction of the upper one (Lentz's method), which converges fast for x > a + 1.
fn upper_fraction(a: f64, x: f64) -> f64 {
    let mut b = x + 1.0 - a;
    let mut c = f64::MAX;
    let mut d = 1.0 / b;
    let mut fraction = d;
    let mut i = 0.0;
    loop {
        i += 1.0;
        let numerator = i * (a - i);
        b += 2.0;
        d = 1.0 / (numerator * d + b);
        c = b + numerator / c;
        fraction *= c * d;
        if (c * d - 1.0).abs() < 4.0 * f64::EPSILON || i > 10_000.0 {
            return fraction;
        }
    }
}

/// ln(Gamma(x)) for x > 0: Stirling's series at x + 8 or more, brought back by Gamma(x + 1) = x Gamma(x).
fn ln_gamma(x: f64) -> f64 {
    let (mut z, mut product) = (x, 1.0);
    while z < 16.0 {
        product *= z;
        z += 1.0;
    }
    let correction =
        1.0 / (12.0 * z) - 1.0 / (360.0 * z.powi(3)) + 1.0 / (1260.0 * z.powi(5)) - 1.0 / (1680.0 * z.powi(7));
    (z - 0.5) * z.ln() - z + 0.5 * std::f64::consts::TAU.ln() + correction - product.ln()
}

#[cfg(test)]
mod tests {
    use super::{assert_even, chi_squared, ln_gamma, upper_gamma};

    fn close(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 1e-9, "{found:e} instead of {expected:e}");
    }

    #[test]
    fn p_values_are_those_of_the_textbook() {
        // Degrees of freedom, statistic at p = 0.05 and p = 0.001; from the tables, so to four digits.
        for (degrees, at_5_percent, at_1_permille) in [
            (1.0, 3.841, 10.828),
            (2.0, 5.991, 13.816),
            (3.0, 7.815, 16.266),
            (10.0, 18.307, 29.588),
            (100.0, 124.342, 149.449),
        ] {
            assert!((upper_gamma(degrees / 2.0, at_5_percent / 2.0) / 0.05 - 1.0).abs() < 1e-3);
            assert!((upper_gamma(degrees / 2.0, at_1_permille / 2.0) / 0.001 - 1.0).abs() < 1e-3);
        }
    }

    #[test]
    fn even_degrees_of_freedom_agree_with_the_closed_form() {
        for x in [1e-3, 0.5, 1.0, 2.0, 4.9, 5.1, 40.0, 300.0_f64] {
            close(upper_gamma(1.0, x), (-x).exp());
            close(upper_gamma(2.0, x), (-x).exp() * (1.0 + x));
            close(upper_gamma(4.0, x), (-x).exp() * (1.0 + x + x.powi(2) / 2.0 + x.powi(3) / 6.0));
        }
    }

    #[test]
    fn gamma_is_the_factorial() {
        assert!(ln_gamma(1.0).abs() < 1e-13);
        close(ln_gamma(5.0), 24_f64.ln());
        close(ln_gamma(0.5), std::f64::consts::PI.sqrt().ln());
        close(ln_gamma(21.0), 2_432_902_008_176_640_000_f64.ln());
    }

    #[test]
    fn even_counts_pass_and_uneven_counts_do_not() {
        close(chi_squared(&[44, 56]), upper_gamma(0.5, 0.72));
        assert!((chi_squared(&[500, 500, 500, 500]) - 1.0).abs() < 1e-12);
        assert_even("a fair draw", &[512, 488, 530, 470]);
        assert!(chi_squared(&[1000, 1000, 1000, 600]) < 1e-12);
        assert!(chi_squared(&[2000, 0]) < 1e-100);
    }
}
