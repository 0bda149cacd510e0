//! Several levels of blocks in the block form (docs/definitions.md, section 5): selection, forward and backward against the formulas.

use half::bf16;
use mra_attention::reference::{Attention, Ladder, Refined, Saved};
use mra_attention::{Budget, CoarserLevel, Mode, Problem};
use ndarray::{Array3, Array4, Axis};
use proptest::prelude::*;

use crate::support::{
    Bounds, Case, Data, Layout, Number, Padding, Pairs, Rounded, Setup, assert_close, assert_same_blocks, attend, bits,
    differentiate, flushed, largest, levels_for, rounds_weights, with_options,
};

/// A case with blocks of several sizes.
#[derive(Debug, Clone)]
struct LadderCase {
    /// Its blocks and its budget are the finest ones.
    case: Case,
    /// The sizes and budgets of the levels above, the coarsest first.
    coarser: Vec<(usize, Vec<f64>)>,
}

impl LadderCase {
    fn levels(&self) -> Vec<CoarserLevel> {
        let level =
            |(block_size, rates): &(usize, Vec<f64>)| CoarserLevel { block_size: *block_size, blocks_per_row: rates.clone() };
        self.coarser.iter().map(level).collect()
    }

    fn budgets(&self) -> Vec<Budget> {
        let coarser =
            self.coarser.iter().map(|(_, rates)| Budget { blocks_per_row: rates.clone(), ..self.case.budget.clone() });
        coarser.chain([self.case.budget.clone()]).collect()
    }

    fn ladder<'a>(&self, attention: &Attention<'a>) -> Ladder<'a> {
        let sizes: Vec<usize> = self.coarser.iter().map(|level| level.0).chain([self.case.block_size]).collect();
        Ladder::new(attention, &sizes)
    }

    fn with_problem<R>(&self, data: &Data, setup: Setup, body: impl FnOnce(&Problem) -> R) -> R {
        with_options(&self.case, data, setup, |options| {
            let options = mra_attention::Options { coarser: self.levels(), ..options };
            body(&Problem::new(self.case.query_shape(), self.case.key_shape(), &options).expect("a valid case"))
        })
    }
}

/// What the formulas give.
struct Expected {
    refined: Refined,
    out: Array4<f64>,
    lse: Array3<f64>,
    saved_out: Array4<f64>,
    saved_lse: Array3<f64>,
    gradients: [Array4<f64>; 3],
    bounds: Bounds,
}

impl Expected {
    fn new<E: Number>(ladder_case: &LadderCase, data: &Data) -> Self {
        let case = &ladder_case.case;
        let attention = data.attention(case);
        let ladder = ladder_case.ladder(&attention);
        let refined = ladder.select(&ladder_case.budgets());
        let (out, lse) = ladder.forward(&refined);
        let saved_out = out.mapv(|x| E::round(x).exact());
        let saved_lse = lse.mapv(|x| E::Compute::round(x).exact());
        let saved = Saved {
            out: saved_out.view(),
            lse: saved_lse.view(),
            grad_out: data.grad_out.view(),
            grad_lse: data.grad_lse.as_ref().map(|array| array.view()),
        };
        let all = ladder.backward(&refined, &saved);
        let rows = (case.batch, case.heads(), case.query_len, 1);
        let (ones, zeros) = (Array4::ones(rows), Array4::zeros(rows));
        let value = Array4::zeros((case.batch, case.kv_heads, case.key_len, 1));
        let of_ones = Saved { out: zeros.view(), grad_out: ones.view(), grad_lse: None, ..saved };
        let weights = ladder_case.ladder(&Attention { value: value.view(), ..attention }).backward(&refined, &of_ones);
        let coarsest = Case { block_size: ladder_case.coarser[0].0, ..case.clone() };
        let bounds = Bounds::with_column::<E>(&coarsest, data, &attention, largest(&weights.value), &saved);
        let bounds = bounds.times(ladder_case.coarser.len() as f64 + 1.0);
        Self { refined, out, lse, saved_out, saved_lse, gradients: [all.query, all.key, all.value], bounds }
    }
}

fn plan_of(problem: &Problem, refined: &Refined) -> Vec<u8> {
    problem.plan_from_levels(|level, b, h, row, j| refined[level][b].get((h, row, j)).copied().unwrap_or(false))
}

fn check<E: Number>(ladder_case: &LadderCase, data: &Data, expected: &Expected, setup: Setup) {
    let case = &ladder_case.case;
    let context = |what: &str| format!("{what} of {} at {}, {setup:?}, {ladder_case:?}", E::NAME, setup.level.name());
    let mut bounds = expected.bounds;
    if rounds_weights::<E>(setup.level) {
        bounds.out += E::ROUNDOFF * largest(&data.value);
        let Bounds { out, lse, query, key, value, .. } = &mut bounds;
        [out, lse, query, key, value].into_iter().for_each(|bound| *bound += flushed(case, data));
    }
    ladder_case.with_problem(data, setup, |problem| {
        let plan = plan_of(problem, &expected.refined);
        for (actual, expected) in problem.is_refined(&plan).expect("a plan of the problem").iter().zip(&expected.refined) {
            assert_same_blocks(actual, expected, || context("a plan of what is chosen"));
        }
        let (out, lse, _) = attend::<E>(problem, data, Some(&plan), setup.layout);
        assert_close(&out, expected.out.view(), bounds.out, || context("out"));
        assert_close(&lse, expected.lse.view().insert_axis(Axis(3)), bounds.lse, || context("lse"));
        let saved = (&expected.saved_out, &expected.saved_lse);
        let gradients = differentiate::<E>(problem, data, &plan, saved, setup.layout);
        let of_inputs = [("dq", bounds.query), ("dk", bounds.key), ("dv", bounds.value)];
        for (((name, bound), actual), expected) in of_inputs.into_iter().zip(&gradients).zip(&expected.gradients) {
            assert_close(actual, expected.view(), bound, || context(name));
        }
        let (own_out, own_lse, own) = attend::<E>(problem, data, None, setup.layout);
        let (out, lse, _) = attend::<E>(problem, data, Some(&own), setup.layout);
        assert!(bits(&own_out) == bits(&out) && bits(&own_lse) == bits(&lse), "{}", context("forward with its own plan"));
        if E::ROUNDOFF < f32::ROUNDOFF && case.scale != Some(0.0) {
            // In float64 no two scores are so close that rounding decides, unless all logits are equal.
            let chosen = problem.is_refined(&own).expect("a plan of the problem");
            for (level, (actual, expected)) in chosen.iter().zip(&expected.refined).enumerate() {
                assert_same_blocks(actual, expected, || context(&format!("the selection at level {level}")));
            }
            assert!(own == plan, "{}", context("the bytes of a plan"));
        }
    });
}

fn check_type<E: Number>(case: &LadderCase, threads: usize, layout: Layout) {
    let data = case.case.data::<E>();
    let expected = Expected::new::<E>(case, &data);
    for level in levels_for::<E>() {
        check::<E>(case, &data, &expected, Setup { level, threads, layout });
    }
}

fn padding() -> impl Strategy<Value = Padding> {
    prop_oneof![
        3 => Just(Padding::None),
        2 => Just(Padding::Right),
        2 => Just(Padding::Left),
        2 => Just(Padding::Holes),
        2 => Just(Padding::Blocks),
        1 => Just(Padding::All),
    ]
}

fn rates(heads: usize) -> impl Strategy<Value = Vec<f64>> {
    let rate = || prop_oneof![8 => 0.01..9.0, 2 => Just(f64::INFINITY)];
    prop_oneof![3 => proptest::collection::vec(rate(), 1), 1 => proptest::collection::vec(rate(), heads.max(1))]
}

fn length(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0), 30 => 1..=most]
}

fn with_levels(case: Case) -> impl Strategy<Value = LadderCase> {
    let heads = case.heads();
    let levels = proptest::collection::vec((2..6usize, rates(heads)), 1..4);
    let forced = (proptest::option::of(0..3usize), prop_oneof![2 => Just(0), 1 => 0..6usize], 1..3usize);
    (levels, rates(heads), forced).prop_map(move |(levels, blocks_per_row, (first_blocks, diagonal_blocks, local_blocks))| {
        let mut size = case.block_size;
        let mut coarser: Vec<_> = levels
            .into_iter()
            .map(|(ratio, rates)| {
                size *= ratio;
                (size, rates)
            })
            .collect();
        coarser.reverse();
        let budget = Budget { blocks_per_row, first_blocks, diagonal_blocks, local_blocks, num_blocks: None };
        LadderCase { case: Case { budget, ..case.clone() }, coarser }
    })
}

prop_compose! {
    fn ladder_case()(
        (batch, kv_heads, group) in (length(2), 1..3usize, 1..3usize),
        (query_len, key_len) in prop_oneof![
            2 => (length(90), length(140)),
            2 => length(120).prop_map(|length| (length, length)),
        ],
        (head_dim, value_dim) in (1..20usize, length(20)),
        block_size in 1..6usize,
        mode in prop_oneof![3 => Just(Mode::Full), 1 => Just(Mode::Sparse)],
        (query_padding, key_padding) in (prop_oneof![1 => Just(Padding::None), 1 => padding()], padding()),
        pairs in prop_oneof![4 => Just(Pairs::All), 1 => Just(Pairs::Keys), 1 => Just(Pairs::Biased)],
        softcap in proptest::option::weighted(0.2, 10.0..40.0),
        (alibi, sinks) in (proptest::bool::weighted(0.2), proptest::bool::weighted(0.2)),
        scale in prop_oneof![2 => Just(None), 1 => (-0.7..0.7).prop_map(Some)],
        magnitude in prop_oneof![4 => Just(1.0), 1 => Just(20.0)],
        grad_lse in any::<bool>(),
        seed in any::<u64>(),
    )(
        case in with_levels(Case {
            batch, kv_heads, group, query_len, key_len, head_dim, value_dim, block_size, mode, query_padding, key_padding, pairs,
            softcap, alibi, sinks, scale, magnitude, grad_lse, seed, ..Case::default()
        })
    ) -> LadderCase {
        case
    }
}

/// `PROPTEST_CASES` in the environment, or few enough for every day.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { 96 };
    ProptestConfig { cases, failure_persistence: None, ..default }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn forward_and_backward(case in ladder_case(), threads in 1..4usize, strided in any::<bool>()) {
        let layout = if strided { Layout::TokensFirst } else { Layout::Contiguous };
        check_type::<f64>(&case, threads, layout);
        check_type::<f32>(&case, threads, layout);
        check_type::<bf16>(&case, threads, layout);
    }
}
