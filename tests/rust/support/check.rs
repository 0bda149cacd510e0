//! Results of the crate, and their comparison with the formulas.

use mra_attention::reference::{Gradients as Expect, Saved};
use ndarray::{Array3, Array4, ArrayView4, Axis};

use super::case::poison;
use super::{
    Bounds, Case, Data, Layout, Number, Rounded, Setup, attend, differentiate, exact_of, levels_for, plan_of, select,
    with_problem,
};

/// What the formulas give for a case. Backward starts from `out` and `lse` as the type of the tensor holds them.
pub(crate) struct Expected {
    pub(crate) selected: Vec<Array3<bool>>,
    pub(crate) out: Array4<f64>,
    pub(crate) lse: Array3<f64>,
    pub(crate) saved_out: Array4<f64>,
    pub(crate) saved_lse: Array3<f64>,
    pub(crate) gradients: Expect,
    pub(crate) bounds: Bounds,
}

impl Expected {
    /// With the selection of the formulas.
    pub(crate) fn new<E: Number>(case: &Case, data: &Data) -> Self {
        let selected = data.attention(case).select(&case.budget);
        Self::with_selection::<E>(case, data, selected)
    }

    pub(crate) fn with_selection<E: Number>(case: &Case, data: &Data, selected: Vec<Array3<bool>>) -> Self {
        let attention = data.attention(case);
        let (out, lse) = attention.forward(&selected);
        let mut saved_out = out.mapv(|x| E::round(x).exact());
        poison(&mut saved_out, data.query_mask.as_ref());
        let mut saved_lse = lse.mapv(|x| E::Compute::round(x).exact()).insert_axis(Axis(3));
        poison(&mut saved_lse, data.query_mask.as_ref());
        let saved_lse = saved_lse.remove_axis(Axis(3));
        let saved = Saved {
            out: saved_out.view(),
            lse: saved_lse.view(),
            grad_out: data.grad_out.view(),
            grad_lse: data.grad_lse.as_ref().map(|array| array.view()),
        };
        let gradients = attention.backward(&selected, &saved);
        let bounds = Bounds::new::<E>(case, data, &attention, &selected, &saved);
        Self { selected, out, lse, saved_out, saved_lse, gradients, bounds }
    }
}

/// What the crate gives.
pub(crate) struct Outcome<E: Number> {
    pub(crate) out: Array4<E>,
    pub(crate) lse: Array4<E::Compute>,
    pub(crate) plan: Vec<u8>,
    pub(crate) query: Array4<E>,
    pub(crate) key: Array4<E>,
    pub(crate) value: Array4<E>,
}

impl<E: Number> Outcome<E> {
    /// Forward with the plan that it chooses, and backward from what it gave.
    pub(crate) fn own(case: &Case, data: &Data, setup: Setup) -> Self {
        with_problem(case, data, setup, |problem| {
            let (out, lse, plan) = attend::<E>(problem, data, None, setup.layout);
            let saved = (&out.mapv(Rounded::exact), &lse.mapv(Rounded::exact).remove_axis(Axis(3)));
            let [query, key, value] = differentiate::<E>(problem, data, &plan, saved, setup.layout);
            Self { out, lse, plan, query, key, value }
        })
    }

    /// The results with their names, as bits.
    pub(crate) fn bits(&self) -> [(&'static str, Vec<u64>); 5] {
        [
            ("out", bits(&self.out)),
            ("lse", bits(&self.lse)),
            ("dq", bits(&self.query)),
            ("dk", bits(&self.key)),
            ("dv", bits(&self.value)),
        ]
    }
}

/// Forward and backward of the crate with the plan of `expected`; backward starts from what it says.
pub(crate) fn compute<E: Number>(case: &Case, data: &Data, expected: &Expected, setup: Setup) -> Outcome<E> {
    with_problem(case, data, setup, |problem| {
        let plan = plan_of(problem, &expected.selected);
        let (out, lse, plan) = attend::<E>(problem, data, Some(&plan), setup.layout);
        let saved = (&expected.saved_out, &expected.saved_lse);
        let [query, key, value] = differentiate::<E>(problem, data, &plan, saved, setup.layout);
        Outcome { out, lse, plan, query, key, value }
    })
}

/// The blocks that the crate's own plan makes exact, and the plan.
pub(crate) fn selected_by<E: Number>(case: &Case, data: &Data, setup: Setup) -> (Vec<Array3<bool>>, Vec<u8>) {
    let plan = select::<E>(case, data, setup);
    (with_problem(case, data, setup, |problem| exact_of(problem, &plan)), plan)
}

/// The same blocks; there may be room for more rows and columns than a batch item has.
pub(crate) fn assert_same_blocks(actual: &[Array3<bool>], expected: &[Array3<bool>], context: impl Fn() -> String) {
    assert_eq!(actual.len(), expected.len(), "{}", context());
    for (item, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let alone = |a: &Array3<bool>, b: &Array3<bool>| {
            a.indexed_iter().find(|&(at, &exact)| exact && b.get(at) != Some(&true)).map(|(at, _)| at)
        };
        let different = alone(actual, expected).or_else(|| alone(expected, actual));
        assert!(different.is_none(), "batch item {item}: (head, row, block) {different:?} differs: {}", context());
    }
}

/// Compares forward and backward of the crate with the formulas and, where rounding has no say, its choice of blocks.
pub(crate) fn check<E: Number>(case: &Case, data: &Data, expected: &Expected, setup: Setup) {
    let outcome = compute::<E>(case, data, expected, setup);
    let Bounds { out, lse, query, key, value, .. } = expected.bounds.at::<E>(setup.level, case, data);
    let context = |what: &str| format!("{what} of {} at {}, {setup:?}, {case:?}", E::NAME, setup.level.name());
    let expected_lse = expected.lse.view().insert_axis(Axis(3));
    assert_close(&outcome.out, expected.out.view(), out, || context("out"));
    assert_close(&outcome.lse, expected_lse, lse, || context("lse"));
    assert_close(&outcome.query, expected.gradients.query.view(), query, || context("the gradient of query"));
    assert_close(&outcome.key, expected.gradients.key.view(), key, || context("the gradient of key"));
    assert_close(&outcome.value, expected.gradients.value.view(), value, || context("the gradient of value"));
    if E::ROUNDOFF < f32::ROUNDOFF && case.scale != Some(0.0) {
        // In float64 no two scores are so close that rounding decides, unless all logits are equal.
        let (own, own_plan) = selected_by::<E>(case, data, setup);
        let attention = data.attention(case);
        let wanted = attention.exact(&attention.select(&case.budget));
        assert_same_blocks(&own, &wanted, || context("the selection"));
        let (same_out, same_lse, same_plan) =
            with_problem(case, data, setup, |problem| attend::<E>(problem, data, None, setup.layout));
        assert!(same_plan == own_plan, "{}", context("the plan of forward"));
        let (out, lse, _) =
            with_problem(case, data, setup, |problem| attend::<E>(problem, data, Some(&own_plan), setup.layout));
        assert!(
            bits(&same_out) == bits(&out) && bits(&same_lse) == bits(&lse),
            "{}",
            context("forward with the plan it chose")
        );
    }
}

/// Each case at every level, in turns in one of two layouts.
pub(crate) fn check_all<E: Number>(cases: &[Case]) {
    for (index, case) in cases.iter().enumerate() {
        let data = case.data::<E>();
        let expected = Expected::new::<E>(case, &data);
        for level in levels_for::<E>() {
            let layout = if index % 2 == 0 { Layout::Contiguous } else { Layout::TokensFirst };
            check::<E>(case, &data, &expected, Setup { layout, ..Setup::new(level) });
        }
    }
}

/// Every element within `bound` of what is expected, and half a unit in the last place for the rounding to its type.
pub(crate) fn assert_close<E: Rounded>(
    results: &Array4<E>,
    expected: ArrayView4<'_, f64>,
    bound: f64,
    context: impl Fn() -> String,
) {
    assert_eq!(results.dim(), expected.dim(), "{}", context());
    assert!(bound.is_finite(), "{}: no bound", context());
    for ((index, result), &expected) in results.indexed_iter().zip(expected) {
        let error = (result.exact() - expected).abs();
        let bound = bound + E::ROUNDOFF * (expected.abs() + bound) + E::UNDERFLOW;
        // The infinities of an lse are equal, and their difference is NaN.
        assert!(
            result.exact() == expected || error <= bound,
            "{result:?} at {index:?} is off by {error:e} from {expected:e}, more than {bound:e}: {}",
            context()
        );
    }
}

/// For comparison to the bit.
pub(crate) fn bits<'a, E: Rounded + 'a>(numbers: impl IntoIterator<Item = &'a E>) -> Vec<u64> {
    numbers.into_iter().map(|x| x.exact().to_bits()).collect()
}
