//! Numbers at the ends of what the types hold.

use mra_attention::{Coarse, Mode};

use crate::support::{
    CAUSAL, Case, Expected, Number, Padding, Setup, check, compute, levels, levels_for, levels_required, selected_by,
};

/// In both modes and forms.
fn cases(magnitude: f64, scale: Option<f64>) -> Vec<Case> {
    let case = Case {
        batch: 2,
        group: 2,
        query_len: 29,
        key_len: 35,
        head_dim: 12,
        key_padding: Padding::Holes,
        magnitude,
        scale,
        ..Case::default()
    };
    let modes = [Mode::Full, Mode::Sparse].map(|mode| Case { mode, ..case.clone() });
    let expanded = Case { coarse: Coarse::FirstOrder, ..case };
    let forms = |case: Case| [case.clone(), Case { window: CAUSAL, ..case }];
    modes.into_iter().flat_map(forms).chain([expanded]).collect()
}

/// Logits of 1e4: weights are 0 or 1, and nothing overflows.
#[test]
fn huge_logits() {
    fn check_type<E: Number>() {
        for case in cases(1e4, None) {
            let data = case.data::<E>();
            let expected = Expected::new::<E>(&case, &data);
            for level in levels_for::<E>() {
                check::<E>(&case, &data, &expected, Setup::new(level));
                let outcome = compute::<E>(&case, &data, &expected, Setup::new(level));
                assert!(outcome.out.iter().all(|x| x.exact().is_finite()), "{} at {}", E::NAME, level.name());
            }
        }
    }
    check_type::<f64>();
    check_type::<f32>();
    check_type::<half::bf16>();
}

#[test]
fn denormal_numbers() {
    fn check_type<E: Number>(magnitude: f64) {
        for case in cases(magnitude, None) {
            let data = case.data::<E>();
            assert!(data.query.iter().any(|&x| x != 0.0), "{magnitude:e} is not 0 in {}", E::NAME);
            let expected = Expected::new::<E>(&case, &data);
            for level in levels_for::<E>() {
                check::<E>(&case, &data, &expected, Setup::new(level));
            }
        }
    }
    check_type::<f32>(1e-40);
    check_type::<half::bf16>(1e-40);
    check_type::<half::f16>(1e-6);
    check_type::<f64>(1e-310);
}

/// The scale and the numbers may be such that only their product is of ordinary size.
#[test]
fn scale_makes_up_for_magnitude() {
    for case in cases(1e20, Some(1e-20)) {
        let data = case.data::<f32>();
        let expected = Expected::new::<f32>(&case, &data);
        for level in levels() {
            check::<f32>(&case, &data, &expected, Setup::new(level));
        }
    }
}

/// NaN and infinity at valid tokens are the caller's, but every row keeps a block and the head keeps its budget.
#[test]
fn budget_with_nan_and_infinity() {
    for bad in [f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for array in [0, 1] {
            let case = Case { query_len: 32, key_len: 32, ..Case::default() };
            let mut data = case.data::<f32>();
            [&mut data.query, &mut data.key][array][[0, 0, 9, 3]] = bad;
            for level in levels() {
                let (selected, _) = selected_by::<f32>(&case, &data, Setup::new(level));
                let context = || format!("{bad} in {} at {}", ["query", "key"][array], level.name());
                let number = selected[0].iter().filter(|&&exact| exact).count();
                // 2 blocks per row, 8 rows.
                assert_eq!(number, 16, "{}", context());
                let rows = selected[0].rows();
                assert!(rows.into_iter().all(|row| row.iter().any(|&exact| exact)), "a row without a block: {}", context());
            }
        }
    }
}

#[test]
fn missing_levels_fail_where_they_are_required() {
    assert_eq!(levels_required(Some("portable")), levels());
    assert_eq!(levels_required(Some("")), levels());
    let missing = std::panic::catch_unwind(|| levels_required(Some("portable, avx1024"))).expect_err("no CPU has it");
    assert!(missing.downcast_ref::<String>().is_some_and(|message| message.contains("avx1024")));
}
