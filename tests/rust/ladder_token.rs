//! The token form with several levels against the formulas (docs/definitions.md, section 5).

use half::{bf16, f16};
use mra_attention::reference::{Gradients as Expect, Refined, Saved, TokenLadder};
use mra_attention::{BiasGradient, Budget, CoarserLevel, Mode, Options, Problem, Score, Window};
use ndarray::{Array3, Array4, Axis};
use proptest::prelude::*;

use crate::support::{
    Bounds, CAUSAL, Case, Data, Layout, Number, Outcome, Padding, Pairs, Rounded, Setup, Stored, assert_close,
    assert_same_blocks, attend, bits, differentiate, differentiate_bias, levels, levels_for, with_problem,
};

/// Blocks of 4 in blocks of 8 in blocks of 32.
fn levels_above(rates: [f64; 2]) -> Vec<CoarserLevel> {
    [32, 8].into_iter().zip(rates).map(|(block_size, rate)| CoarserLevel { block_size, blocks_per_row: vec![rate] }).collect()
}

fn base() -> Case {
    Case {
        batch: 2,
        kv_heads: 2,
        group: 2,
        query_len: 150,
        key_len: 150,
        head_dim: 11,
        value_dim: 6,
        coarser: levels_above([2.0, 3.0]),
        window: CAUSAL,
        budget: Budget { blocks_per_row: vec![5.0], ..Budget::default() },
        ..Case::default()
    }
}

fn sizes(case: &Case) -> Vec<usize> {
    case.coarser.iter().map(|level| level.block_size).collect()
}

fn rates(case: &Case) -> Vec<Vec<f64>> {
    let above = case.coarser.iter().map(|level| level.blocks_per_row.clone());
    above.chain([case.budget.blocks_per_row.clone()]).collect()
}

/// What the formulas give.
struct Expected {
    refined: Refined,
    out: Array4<f64>,
    lse: Array3<f64>,
    saved_out: Array4<f64>,
    saved_lse: Array3<f64>,
    gradients: Expect,
    bounds: Bounds,
    rounding_decides: bool,
}

impl Expected {
    fn new<E: Number>(case: &Case, data: &Data) -> Self {
        let ladder = TokenLadder { attention: data.attention(case), coarser: sizes(case) };
        let refined = ladder.select(&rates(case), &case.budget);
        let (out, lse) = ladder.forward(&refined);
        let (saved_out, saved_lse) = (out.mapv(|x| E::round(x).exact()), lse.mapv(|x| E::Compute::round(x).exact()));
        let saved = Saved {
            out: saved_out.view(),
            lse: saved_lse.view(),
            grad_out: data.grad_out.view(),
            grad_lse: data.grad_lse.as_ref().map(|array| array.view()),
        };
        let gradients = ladder.backward(&refined, &saved);
        let bounds = Bounds::of_ladder::<E>(case, data, &ladder, &refined, &saved);
        let rounding_decides = ladder.rounding_decides();
        Self { refined, out, lse, saved_out, saved_lse, gradients, bounds, rounding_decides }
    }

    fn plan(&self, problem: &Problem) -> Vec<u8> {
        problem.plan_from_levels(|level, b, h, t, j| self.refined[level][b].get((h, t, j)).is_some_and(|&x| x))
    }
}

/// Padded queries have outputs and gradients of 0, and hold NaN.
fn check<E: Number>(case: &Case, data: &Data, expected: &Expected, setup: Setup) {
    let context = |what: &str| format!("{what} of {} at {}, {setup:?}, {case:?}", E::NAME, setup.level.name());
    with_problem(case, data, setup, |problem| {
        let plan = expected.plan(problem);
        let (out, lse, _) = attend::<E>(problem, data, Some(&plan), setup.layout);
        let saved = (&expected.saved_out, &expected.saved_lse);
        let gradients = differentiate::<E>(problem, data, &plan, saved, setup.layout);
        let bounds = expected.bounds.at::<E>(setup.level, case, data);
        assert_close(&out, expected.out.view(), bounds.out, || context("out"));
        assert_close(&lse, expected.lse.view().insert_axis(Axis(3)), bounds.lse, || context("lse"));
        let Expect { query, key, value, .. } = &expected.gradients;
        let wanted = [("query", query, bounds.query), ("key", key, bounds.key), ("value", value, bounds.value)];
        for (gradient, (name, wanted, bound)) in gradients.iter().zip(wanted) {
            assert_close(gradient, wanted.view(), bound, || context(&format!("the gradient of {name}")));
        }
        if E::ROUNDOFF < f32::ROUNDOFF && !(case.score == Score::Max && expected.rounding_decides) {
            let (own_out, own_lse, own_plan) = attend::<E>(problem, data, None, setup.layout);
            for (level, (own, wanted)) in
                problem.is_refined(&own_plan).expect("its plan").iter().zip(&expected.refined).enumerate()
            {
                assert_same_blocks(own, wanted, || context(&format!("the selection of level {level}")));
            }
            assert!(bits(&own_out) == bits(&out) && bits(&own_lse) == bits(&lse), "{}", context("forward that chooses"));
        }
    });
}

fn check_type<E: Number>(case: &Case, threads: usize, layout: Layout) {
    let data = case.data::<E>();
    let expected = Expected::new::<E>(case, &data);
    for level in levels_for::<E>() {
        check::<E>(case, &data, &expected, Setup { level, threads, layout });
    }
}

#[test]
fn forward_and_backward_are_the_formulas() {
    let window = Window { left: Some(50), right: Some(20) };
    let far = Budget { first_blocks: Some(3), local_blocks: 3, ..base().budget };
    let cases = [
        base(),
        Case { mode: Mode::Sparse, ..base() },
        Case { window: Window::default(), pool_queries: false, query_len: 37, ..base() },
        Case { window, budget: far, ..base() },
        Case { pairs: Pairs::Documents, ..base() },
        Case { pairs: Pairs::Biased, alibi: true, sinks: true, softcap: Some(20.0), ..base() },
        Case { key_padding: Padding::Holes, offsets: vec![5, -3], ..base() },
        Case { key_padding: Padding::Left, query_padding: Padding::Right, ..base() },
        Case { coarser: levels_above([f64::INFINITY, 2.0]), ..base() },
        Case { coarser: levels_above([2.0, f64::INFINITY]), ..base() },
        Case {
            coarser: levels_above([f64::INFINITY; 2]),
            budget: Budget { blocks_per_row: vec![f64::INFINITY], ..base().budget },
            ..base()
        },
        Case { head_dim: 16, value_dim: 16, coarser: levels_above([1.0; 2])[1..].to_vec(), ..base() },
    ];
    for (index, case) in cases.iter().enumerate() {
        let layout = if index % 2 == 0 { Layout::Contiguous } else { Layout::TokensFirst };
        for score in [Score::Mean, Score::Max] {
            let case = Case { score, ..case.clone() };
            check_type::<f64>(&case, 1 + index % 3, layout);
            check_type::<f32>(&case, 1 + index % 3, layout);
        }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let shape = (1..3usize, 1..3usize, 1..3usize, 1..120usize, 1..300usize, (1..20usize, 1..20usize));
    let sizes = (1..9usize, proptest::collection::vec(2..6usize, 1..4));
    let rate = || prop_oneof![8 => 0.5..6.0, 1 => Just(f64::INFINITY)];
    let forced = (proptest::option::of(0..5usize), 0..6usize, 1..6usize);
    let limit = || proptest::option::weighted(0.5, 0..90usize);
    let window = prop_oneof![2 => Just(CAUSAL), 2 => (limit(), limit()).prop_map(|(left, right)| Window { left, right })];
    let hidden = (
        window,
        prop_oneof![3 => Just(Padding::None), 1 => Just(Padding::Left), 1 => Just(Padding::Holes), 1 => Just(Padding::Blocks)],
        prop_oneof![4 => Just(Pairs::All), 1 => Just(Pairs::Holes), 1 => Just(Pairs::Biased), 1 => Just(Pairs::Documents), 1 => Just(Pairs::Keys)],
        -40..200i64,
    );
    let terms = (
        proptest::option::weighted(0.2, 10.0..40.0),
        proptest::bool::weighted(0.2),
        proptest::bool::weighted(0.2),
        proptest::bool::weighted(0.3),
        prop_oneof![Just(Score::Mean), Just(Score::Max)],
    );
    (shape, sizes, proptest::collection::vec(rate(), 4), forced, hidden, terms, any::<u64>()).prop_map(
        |(shape, (block_size, ratios), rates, forced, (window, key_padding, pairs, offset), terms, seed)| {
            let (batch, kv_heads, group, query_len, key_len, (head_dim, value_dim)) = shape;
            let mut size = block_size;
            let mut coarser: Vec<CoarserLevel> = Vec::new();
            for (&ratio, &rate) in ratios.iter().zip(&rates) {
                size *= ratio;
                coarser.insert(0, CoarserLevel { block_size: size, blocks_per_row: vec![rate] });
            }
            let (first_blocks, diagonal_blocks, local_blocks) = forced;
            let budget =
                Budget { blocks_per_row: vec![rates[3]], num_blocks: None, first_blocks, diagonal_blocks, local_blocks };
            let (softcap, alibi, sinks, sparse, score) = terms;
            let mode = if sparse { Mode::Sparse } else { Mode::Full };
            Case {
                batch,
                kv_heads,
                group,
                query_len,
                key_len,
                head_dim,
                value_dim,
                block_size,
                coarser,
                mode,
                window,
                budget,
                key_padding,
                pairs,
                softcap,
                alibi,
                sinks,
                score,
                seed,
                offsets: vec![offset],
                pool_queries: false,
                ..Case::default()
            }
        },
    )
}

/// `PROPTEST_CASES` in the environment, or few enough for every day.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { 48 };
    ProptestConfig { cases, failure_persistence: None, ..default }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random(case in case(), threads in 1..4usize, strided in any::<bool>()) {
        let layout = if strided { Layout::TokensFirst } else { Layout::Contiguous };
        check_type::<f64>(&case, threads, layout);
        check_type::<f32>(&case, threads, layout);
        check_type::<bf16>(&case, threads, layout);
        check_type::<f16>(&case, threads, layout);
    }
}

/// The gradient of a bias of every pair.
#[test]
fn the_gradient_of_a_bias_is_the_formula() {
    for (index, pairs) in [Pairs::Biased, Pairs::Documents].into_iter().enumerate() {
        let case = Case { pairs, alibi: true, softcap: Some(20.0), mode: [Mode::Full, Mode::Sparse][index], ..base() };
        let data = case.data::<f64>();
        let expected = Expected::new::<f64>(&case, &data);
        for level in levels() {
            let mut stored = Stored::<f64>::unset(expected.gradients.bias.dim(), Layout::Contiguous);
            with_problem(&case, &data, Setup { threads: 2, ..Setup::new(level) }, |problem| {
                let plan = expected.plan(problem);
                let saved = (&expected.saved_out, &expected.saved_lse);
                let to = BiasGradient::F64(stored.tensor_mut("grad_bias"));
                differentiate_bias::<f64>(problem, &data, &plan, saved, Layout::Contiguous, Some(to));
            });
            let context = || format!("{pairs:?} at {}", level.name());
            assert_close(&stored.read(), expected.gradients.bias.view(), expected.bounds.pair, context);
        }
    }
}

/// The same bits for any number of threads.
#[test]
fn threads_do_not_matter() {
    let settings = [
        (Mode::Full, 0.0, Score::Mean),
        (Mode::Full, 0.0, Score::Max),
        (Mode::Full, 0.3, Score::Mean),
        (Mode::Sparse, 0.0, Score::Max),
    ];
    for (mode, dropout, score) in settings {
        let case = Case { mode, dropout, score, query_len: 700, key_len: 700, ..base() };
        let data = case.data::<f32>();
        for level in levels() {
            let results: Vec<_> = [1, 2, 3, 5]
                .map(|threads| Outcome::<f32>::own(&case, &data, Setup { threads, ..Setup::new(level) }).bits())
                .into();
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{} {mode:?} {dropout}", level.name());
        }
    }
}

/// A level names no more blocks than the one above hands down, so that one budget without a bound leaves the plan linear in the length.
#[test]
fn a_plan_grows_with_the_length_where_one_level_takes_everything() {
    let unbounded = f64::INFINITY;
    for rates in [[2.0, 3.0, unbounded], [2.0, unbounded, 3.0], [2.0, unbounded, unbounded]] {
        let bytes = |length: usize| {
            let options = Options {
                block_size: 4,
                coarser: levels_above([rates[0], rates[1]]),
                budget: Budget { blocks_per_row: vec![rates[2]], ..Budget::default() },
                window: CAUSAL,
                ..Options::new(levels()[0])
            };
            let shape = [1, 1, length, 8];
            Problem::new(shape, shape, &options).expect("a valid call").plan_bytes()
        };
        let header = 8;
        assert_eq!(bytes(1 << 14) - header, 2 * (bytes(1 << 13) - header), "{rates:?}");
    }
}
