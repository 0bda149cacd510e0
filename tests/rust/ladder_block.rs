//! Several levels of blocks in the block form (docs/definitions.md, section 5): selection, forward and backward against the formulas.

use std::ops::Range;

use half::bf16;
use mra_attention::reference::{Attention, Ladder, Refined, Saved};
use mra_attention::{BiasGradient, Budget, CoarserLevel, Layout as Geometry, Level, Mode, Options, Problem};
use ndarray::{Array2, Array3, Array4, Axis, s};
use proptest::prelude::*;

use crate::support::{
    Bounds, Case, Data, Layout, Number, Padding, Pairs, Rounded, Setup, Stored, assert_close, assert_same_blocks, attend, bits,
    budget, differentiate, differentiate_bias, largest, levels, levels_for, with_options, with_problem,
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
            let options = Options { coarser: self.levels(), ..options };
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
    bias: Array4<f64>,
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
        Self { refined, out, lse, saved_out, saved_lse, gradients: [all.query, all.key, all.value], bias: all.bias, bounds }
    }
}

fn plan_of(problem: &Problem, refined: &Refined) -> Vec<u8> {
    problem.plan_from_levels(|level, b, h, row, j| refined[level][b].get((h, row, j)).copied().unwrap_or(false))
}

fn check<E: Number>(ladder_case: &LadderCase, data: &Data, expected: &Expected, setup: Setup) {
    let case = &ladder_case.case;
    let context = |what: &str| format!("{what} of {} at {}, {setup:?}, {ladder_case:?}", E::NAME, setup.level.name());
    let bounds = expected.bounds.at::<E>(setup.level, case, data);
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

/// More rows in a row of the level above than a tile has, more candidates than a batch has, and enough of them that a sample bounds what is
/// chosen.
#[test]
fn many_children() {
    for (key_padding, mode) in [(Padding::None, Mode::Full), (Padding::Left, Mode::Sparse)] {
        let case =
            Case { query_len: 1500, key_len: 1500, block_size: 4, budget: budget(9.0), key_padding, mode, ..Case::default() };
        let case = LadderCase { case, coarser: vec![(240, vec![3.0])] };
        let data = case.case.data::<f64>();
        let expected = Expected::new::<f64>(&case, &data);
        for level in levels_for::<f64>() {
            check::<f64>(&case, &data, &expected, Setup { threads: 2, ..Setup::new(level) });
        }
    }
}

/// Out, lse, plan and the gradients, which start from out and lse.
struct Outcome<E: Number> {
    out: Array4<E>,
    lse: Array4<E::Compute>,
    plan: Vec<u8>,
    gradients: [Array4<E>; 3],
}

impl<E: Number> Outcome<E> {
    fn new(case: &LadderCase, data: &Data, setup: Setup) -> Self {
        case.with_problem(data, setup, |problem| Self::of(problem, data, setup))
    }

    fn of(problem: &Problem, data: &Data, setup: Setup) -> Self {
        let (out, lse, plan) = attend::<E>(problem, data, None, setup.layout);
        let saved = (&out.mapv(Rounded::exact), &lse.mapv(Rounded::exact).remove_axis(Axis(3)));
        let gradients = differentiate::<E>(problem, data, &plan, saved, setup.layout);
        Self { out, lse, plan, gradients }
    }

    /// The results of the queries and the keys in these ranges, as bits.
    fn bits_of(&self, queries: Range<usize>, keys: Range<usize>) -> [Vec<u64>; 5] {
        let part = |array: &Array4<E>, tokens: &Range<usize>| bits(array.slice(s![.., .., tokens.clone(), ..]).iter());
        let [dq, dk, dv] = &self.gradients;
        let lse = bits(self.lse.slice(s![.., .., queries.clone(), ..]).iter());
        [part(&self.out, &queries), lse, part(dq, &queries), part(dk, &keys), part(dv, &keys)]
    }

    fn bits(&self) -> [Vec<u64>; 5] {
        self.bits_of(0..self.out.dim().2, 0..self.gradients[1].dim().2)
    }
}

fn setup(level: Level, threads: usize) -> Setup {
    Setup { threads, ..Setup::new(level) }
}

/// Three levels of blocks, self-attention.
fn three_levels(length: usize, rates: [f64; 3]) -> LadderCase {
    LadderCase {
        case: Case { query_len: length, key_len: length, block_size: 4, budget: budget(rates[2]), ..Case::default() },
        coarser: vec![(32, vec![rates[0]]), (8, vec![rates[1]])],
    }
}

fn same_for_any_threads<E: Number>() {
    for (index, (batch, kv_heads, group)) in [(1, 1, 1), (1, 1, 3), (2, 5, 1), (1, 4, 2)].into_iter().enumerate() {
        for mode in [Mode::Full, Mode::Sparse] {
            let of = three_levels(1100 - index, [9.0, 14.0, 12.0]);
            let case = Case { batch, kv_heads, group, head_dim: 24, value_dim: 12, mode, key_len: 1083, ..of.case.clone() };
            let case = LadderCase { case: Case { dropout: 0.3, ..case }, ..of };
            let data = case.case.data::<E>();
            for level in levels_for::<E>() {
                let alone = Outcome::<E>::new(&case, &data, setup(level, 1));
                for threads in [2, 3, 5] {
                    let together = Outcome::<E>::new(&case, &data, setup(level, threads));
                    let same = together.plan == alone.plan && together.bits() == alone.bits();
                    assert!(same, "{} with {threads} threads at {}: {case:?}", E::NAME, level.name());
                }
            }
        }
    }
}

#[test]
fn threads_change_nothing() {
    same_for_any_threads::<f64>();
    same_for_any_threads::<f32>();
    same_for_any_threads::<bf16>();
}

/// Where every block is refined at the levels above, what is left is two resolutions.
#[test]
fn everything_refined_above_is_two_resolutions() {
    for (length, padding) in [(75, Padding::None), (70, Padding::Left), (5, Padding::None)] {
        let of = three_levels(length, [f64::INFINITY, f64::INFINITY, 3.0]);
        let case = LadderCase { case: Case { batch: 2, group: 2, key_padding: padding, ..of.case.clone() }, ..of };
        let data = case.case.data::<f64>();
        for level in levels_for::<f64>() {
            let setup = setup(level, 1);
            let ladder = Outcome::<f64>::new(&case, &data, setup);
            let (two, exact) = with_problem(&case.case, &data, setup, |problem| {
                let two = Outcome::<f64>::of(problem, &data, setup);
                let exact = problem.is_exact(&two.plan).expect("a plan of the problem");
                (two, exact)
            });
            let refined = case.with_problem(&data, setup, |problem| problem.is_exact(&ladder.plan)).expect("a plan");
            assert_same_blocks(&refined, &exact, || format!("at {}", level.name()));
            let context = || format!("{length} tokens at {}", level.name());
            assert_close(&ladder.out, two.out.view(), 1e-12, context);
            assert_close(&ladder.lse, two.lse.view(), 1e-12, context);
            for (a, b) in ladder.gradients.iter().zip(&two.gradients) {
                assert_close(a, b.view(), 1e-11, context);
            }
        }
    }
}

/// With every block refined at every level, by budgets that say so or that are large enough, the bits are those of one level with every
/// block.
/// There is room for the children of what the level above refines, whatever a level's own budget is.
#[test]
fn a_plan_grows_with_the_length_where_one_level_takes_everything() {
    let coarser =
        [(256, 1.0), (64, f64::INFINITY)].map(|(block_size, rate)| CoarserLevel { block_size, blocks_per_row: vec![rate] });
    let bytes = |length: usize| {
        let options = Options { block_size: 8, coarser: coarser.to_vec(), budget: budget(1.0), ..Options::new(levels()[0]) };
        let shape = [1, 1, length, 8];
        Problem::new(shape, shape, &options).expect("a valid call").plan_bytes()
    };
    // A bit for each pair of the coarsest blocks is in it.
    let coarsest = |length: usize| (length / 256 + 1) * length / 256 / 8;
    let (short, long) = (bytes(1 << 14) - coarsest(1 << 14), bytes(1 << 15) - coarsest(1 << 15));
    assert!(long <= 2 * short, "{short} bytes, then {long}");
}

#[test]
fn everything_refined_is_softmax_attention() {
    for (length, padding) in [(75, Padding::None), (70, Padding::Left), (3, Padding::None)] {
        for rate in [f64::INFINITY, 1000.0] {
            let of = three_levels(length, [rate; 3]);
            let case = LadderCase { case: Case { batch: 2, key_padding: padding, ..of.case.clone() }, ..of };
            let data = case.case.data::<f32>();
            for level in levels_for::<f32>() {
                let ladder = Outcome::<f32>::new(&case, &data, setup(level, 1));
                let two = with_problem(&case.case, &data, setup(level, 1), |problem| {
                    Outcome::<f32>::of(problem, &data, setup(level, 1))
                });
                assert!(ladder.bits() == two.bits(), "{length} tokens at {}", level.name());
            }
        }
    }
}

/// A sequence with padding around it gives the bits that it gives alone.
#[test]
fn padding_changes_nothing() {
    for (mode, marked) in [(Mode::Full, false), (Mode::Full, true), (Mode::Sparse, false)] {
        let of = three_levels(75, [1.5, 2.0, 2.5]);
        let case = LadderCase { case: Case { mode, group: 2, grad_lse: false, ..of.case.clone() }, ..of };
        let data = case.case.data::<f32>();
        for (before, behind) in [(0, 50), (70, 0), (3, 90), (9, 1)] {
            let (length, number) = (before + 75 + behind, if marked { f64::NAN } else { 3.0 });
            let longer = |array: &Array4<f64>, number: f64| {
                let (b, h, _, d) = array.dim();
                let mut longer = Array4::from_elem((b, h, length, d), number);
                longer.slice_mut(s![.., .., before..before + 75, ..]).assign(array);
                longer
            };
            let mask = Array2::from_shape_fn((1, length), |(_, t)| (before..before + 75).contains(&t));
            let padded = Data {
                query: longer(&data.query, number),
                key: longer(&data.key, f64::NAN),
                value: longer(&data.value, f64::NAN),
                grad_out: longer(&data.grad_out, if marked { number } else { 0.0 }),
                query_mask: marked.then(|| mask.clone()),
                key_mask: Some(mask),
                ..data.clone()
            };
            let of_padded = Case { query_len: length, key_len: length, ..case.case.clone() };
            let of_padded = LadderCase { case: of_padded, coarser: case.coarser.clone() };
            for level in levels_for::<f32>() {
                let alone = Outcome::<f32>::new(&case, &data, setup(level, 1));
                let beside = Outcome::<f32>::new(&of_padded, &padded, setup(level, 1));
                let valid = before..before + 75;
                let same = beside.bits_of(valid.clone(), valid) == alone.bits();
                assert!(same, "{before} before and {behind} behind, {mode:?}, marked {marked}, at {}", level.name());
            }
        }
    }
}

/// Packed sequences get the bits that each gets alone.
#[test]
fn packed_sequences_know_nothing_of_each_other() {
    let lengths = [(70, 70), (0, 5), (33, 20), (8, 141), (1, 0), (3, 3)];
    let of = three_levels(0, [1.5, 2.0, 2.5]);
    let starts = |lengths: Vec<usize>| {
        let mut starts = vec![0];
        for length in lengths {
            starts.push(starts[starts.len() - 1] + length);
        }
        starts
    };
    let (queries, keys) = (starts(lengths.map(|x| x.0).to_vec()), starts(lengths.map(|x| x.1).to_vec()));
    let case = Case { kv_heads: 2, group: 2, query_len: queries[6], key_len: keys[6], ..of.case.clone() };
    let data = case.data::<f32>();
    for level in levels_for::<f32>() {
        let options = Options {
            block_size: 4,
            coarser: of.levels(),
            budget: case.budget.clone(),
            layout: Geometry::Packed { queries: &queries, keys: &keys, lower_right: false },
            ..Options::new(level)
        };
        let problem = Problem::new(case.query_shape(), case.key_shape(), &options).expect("a valid case");
        let together = Outcome::<f32>::of(&problem, &data, setup(level, 1));
        for index in 0..lengths.len() {
            let (of_queries, of_keys) = (queries[index]..queries[index + 1], keys[index]..keys[index + 1]);
            let part = |array: &Array4<f64>, tokens: &Range<usize>| array.slice(s![.., .., tokens.clone(), ..]).to_owned();
            let alone = Data {
                query: part(&data.query, &of_queries),
                key: part(&data.key, &of_keys),
                value: part(&data.value, &of_keys),
                grad_out: part(&data.grad_out, &of_queries),
                grad_lse: data.grad_lse.as_ref().map(|array| array.slice(s![.., .., of_queries.clone()]).to_owned()),
                ..data.clone()
            };
            let (query_len, key_len) = lengths[index];
            let of_alone = LadderCase { case: Case { query_len, key_len, ..case.clone() }, coarser: of.coarser.clone() };
            let expected = Outcome::<f32>::new(&of_alone, &alone, setup(level, 1));
            assert!(together.bits_of(of_queries, of_keys) == expected.bits(), "sequence {index} at {}", level.name());
        }
    }
}

/// The gradients with dropout against differences of `sum(out * g)`, which drops the same.
#[test]
fn backward_drops_what_forward_drops() {
    let of = three_levels(75, [1.5, 2.0, 2.5]);
    let case = LadderCase { case: Case { dropout: 0.3, group: 2, grad_lse: false, ..of.case.clone() }, ..of };
    let data = case.case.data::<f64>();
    let direction = Case { seed: 99, ..case.case.clone() }.data::<f64>();
    for level in levels_for::<f64>() {
        let own = Outcome::<f64>::new(&case, &data, setup(level, 1));
        let whole = LadderCase { case: Case { dropout: 0.0, ..case.case.clone() }, ..case.clone() };
        assert!(bits(&own.out) != bits(&Outcome::<f64>::new(&whole, &data, setup(level, 1)).out), "something is dropped");
        let loss = |step: f64| {
            let moved = |a: &Array4<f64>, b: &Array4<f64>| a + &(b * step);
            let data = Data {
                query: moved(&data.query, &direction.query),
                key: moved(&data.key, &direction.key),
                value: moved(&data.value, &direction.value),
                ..data.clone()
            };
            let run = |problem: &Problem| attend::<f64>(problem, &data, Some(&own.plan), Layout::Contiguous).0;
            (case.with_problem(&data, setup(level, 1), run) * &data.grad_out).sum()
        };
        let [dq, dk, dv] = &own.gradients;
        let expected = (dq * &direction.query).sum() + (dk * &direction.key).sum() + (dv * &direction.value).sum();
        let difference = (loss(1e-5) - loss(-1e-5)) / 2e-5;
        assert!((difference - expected).abs() < 1e-6 * (1.0 + expected.abs()), "{}: {difference} {expected}", level.name());
    }
}

/// The gradient of a bias, of every pair by itself.
#[test]
fn gradient_of_a_bias() {
    for (mode, padding) in [(Mode::Full, Padding::None), (Mode::Full, Padding::Left), (Mode::Sparse, Padding::Holes)] {
        let of = three_levels(75, [1.5, 2.0, 2.5]);
        let case = Case { batch: 2, group: 2, pairs: Pairs::Biased, key_padding: padding, mode, ..of.case.clone() };
        let case = LadderCase { case, ..of };
        let data = case.case.data::<f64>();
        let expected = Expected::new::<f64>(&case, &data);
        for level in levels_for::<f64>() {
            let mut stored = Stored::<f64>::unset((2, 2, 75, 75), Layout::Contiguous);
            case.with_problem(&data, setup(level, 2), |problem| {
                let plan = plan_of(problem, &expected.refined);
                let saved = (&expected.saved_out, &expected.saved_lse);
                let to = BiasGradient::F64(stored.tensor_mut("grad_bias"));
                differentiate_bias::<f64>(problem, &data, &plan, saved, Layout::Contiguous, Some(to));
            });
            assert_close(&stored.read(), expected.bias.view(), 1e-10, || format!("at {}: {case:?}", level.name()));
        }
    }
}
