//! Random inputs of a given shape.

use mra_attention::reference::Attention;
use mra_attention::{Budget, Coarse, CoarserLevel, Mode, Score, Window};
use ndarray::{Array2, Array3, Array4, Axis, s};
use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::Rounded;

/// A query sees no later key.
pub(crate) const CAUSAL: Window = Window { left: None, right: Some(0) };

/// Which tokens are padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Padding {
    /// No mask.
    None,
    /// Sequences of different lengths.
    Right,
    /// The same, at the end of the tensor.
    Left,
    /// A third of the tokens, anywhere.
    Holes,
    /// Every other block, and a few tokens of the others.
    Blocks,
    /// All tokens.
    All,
}

/// Which pairs are hidden or biased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pairs {
    /// No mask and no bias.
    All,
    /// A mask: tokens at most 5 apart.
    Window,
    /// A mask: no later keys.
    Causal,
    /// A mask: every other pair.
    Holes,
    /// A mask that is the same for all queries: every third key, and what is before the fifth one.
    Keys,
    /// A bias, different for each head.
    Biased,
    /// A bias, and documents of 7 tokens that do not see each other.
    Documents,
    /// A bias, and such documents by a huge negative number; every query has a key in its document, or sees all.
    Huge,
}

/// Everything that a call depends on; the numbers come from the seed.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools, reason = "each says something of its own")]
pub(crate) struct Case {
    pub(crate) batch: usize,
    pub(crate) kv_heads: usize,
    /// Query heads per key head.
    pub(crate) group: usize,
    pub(crate) query_len: usize,
    pub(crate) key_len: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) block_size: usize,
    /// Levels above, the coarsest first.
    pub(crate) coarser: Vec<CoarserLevel>,
    pub(crate) mode: Mode,
    /// The means wherever there is a softcap.
    pub(crate) coarse: Coarse,
    pub(crate) coarse_shift: f64,
    pub(crate) score: Score,
    pub(crate) window: Window,
    /// One for all batch items, or one for each.
    pub(crate) offsets: Vec<i64>,
    pub(crate) key_lengths: Option<Vec<usize>>,
    pub(crate) pool_queries: bool,
    pub(crate) query_padding: Padding,
    pub(crate) key_padding: Padding,
    pub(crate) pairs: Pairs,
    pub(crate) softcap: Option<f64>,
    /// Whether heads have biases by distance.
    pub(crate) alibi: bool,
    /// Whether heads have sinks.
    pub(crate) sinks: bool,
    pub(crate) budget: Budget,
    pub(crate) scale: Option<f64>,
    pub(crate) dropout: f64,
    /// Queries are multiplied by this.
    pub(crate) magnitude: f64,
    /// Whether the lse has a gradient.
    pub(crate) grad_lse: bool,
    /// Whether all heads of all batch items are equal.
    pub(crate) equal_heads: bool,
    pub(crate) seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            batch: 1,
            kv_heads: 1,
            group: 1,
            query_len: 8,
            key_len: 8,
            head_dim: 8,
            value_dim: 8,
            block_size: 4,
            coarser: Vec::new(),
            mode: Mode::Full,
            coarse: Coarse::Mean,
            coarse_shift: 0.0,
            score: Score::Mean,
            window: Window::default(),
            offsets: vec![0],
            key_lengths: None,
            pool_queries: true,
            query_padding: Padding::None,
            key_padding: Padding::None,
            pairs: Pairs::All,
            softcap: None,
            alibi: false,
            sinks: false,
            budget: budget(2.0),
            scale: None,
            dropout: 0.0,
            magnitude: 1.0,
            grad_lse: true,
            equal_heads: false,
            seed: 0,
        }
    }
}

/// So many exact blocks for each row, and the defaults.
pub(crate) fn budget(blocks_per_row: f64) -> Budget {
    Budget { blocks_per_row: vec![blocks_per_row], ..Budget::default() }
}

/// The numbers of a case, each one exact in the type it is stored in. Padded tokens hold NaN and infinities.
#[derive(Clone)]
pub(crate) struct Data {
    pub(crate) query: Array4<f64>,
    pub(crate) key: Array4<f64>,
    pub(crate) value: Array4<f64>,
    pub(crate) grad_out: Array4<f64>,
    pub(crate) grad_lse: Option<Array3<f64>>,
    pub(crate) query_mask: Option<Array2<bool>>,
    pub(crate) key_mask: Option<Array2<bool>>,
    pub(crate) bias: Option<Array4<f64>>,
    pub(crate) alibi_slopes: Option<Vec<f64>>,
    pub(crate) sinks: Option<Vec<f64>>,
}

impl Case {
    /// Causal, one batch item with one head of `length` tokens, queries and keys alike.
    pub(crate) fn causal(length: usize, block_size: usize, blocks: usize) -> Self {
        Self {
            query_len: length,
            key_len: length,
            block_size,
            window: CAUSAL,
            budget: budget(blocks as f64),
            ..Self::default()
        }
    }

    /// What stands for coarse blocks in the block form.
    pub(crate) fn coarse_term(&self) -> Coarse {
        if self.softcap.is_some() { Coarse::Mean } else { self.coarse }
    }

    pub(crate) fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    pub(crate) fn query_shape(&self) -> [usize; 4] {
        [self.batch, self.heads(), self.query_len, self.head_dim]
    }

    pub(crate) fn key_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.key_len, self.head_dim]
    }

    pub(crate) fn rng(&self) -> TestRng {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.seed.to_le_bytes());
        TestRng::from_seed(RngAlgorithm::ChaCha, &seed)
    }

    /// The numbers, about as large as normally distributed ones with variance 1.
    pub(crate) fn data<E: Rounded>(&self) -> Data {
        let mut rng = self.rng();
        let query_mask = self.mask(self.query_padding, self.query_len, &mut rng);
        let key_mask = self.mask(self.key_padding, self.key_len, &mut rng);
        let mut numbers = |heads, length, channels, magnitude: f64, mask: Option<&Array2<bool>>| {
            let shape = (self.batch, heads, length, channels);
            let mut array = Array4::from_shape_simple_fn(shape, || E::round(magnitude * rng.random_range(-1.7..1.7)).exact());
            if self.equal_heads && !array.is_empty() {
                let one = array.index_axis(Axis(0), 0).index_axis_move(Axis(0), 0).to_owned();
                array.outer_iter_mut().for_each(|mut item| item.outer_iter_mut().for_each(|mut head| head.assign(&one)));
            }
            poison(&mut array, mask);
            array
        };
        let query = numbers(self.heads(), self.query_len, self.head_dim, self.magnitude, query_mask.as_ref());
        let mut key = numbers(self.kv_heads, self.key_len, self.head_dim, 1.0, key_mask.as_ref());
        let mut value = numbers(self.kv_heads, self.key_len, self.value_dim, 1.0, key_mask.as_ref());
        let grad_out = numbers(self.heads(), self.query_len, self.value_dim, 1.0, query_mask.as_ref());
        let grad_lse =
            self.grad_lse.then(|| numbers(self.heads(), self.query_len, 1, 1.0, query_mask.as_ref()).remove_axis(Axis(3)));
        for (item, &length) in self.key_lengths.iter().flatten().enumerate() {
            for array in [&mut key, &mut value] {
                array.slice_mut(s![item, .., length.., ..]).fill(f64::NAN);
            }
        }
        let bias = self.bias(&mut rng);
        let heads = || 0..self.batch * self.heads();
        let alibi_slopes = self.alibi.then(|| heads().map(|head| 0.5 / (head % 5 + 1) as f64).collect());
        // Among the logits, far above and far below.
        let sinks = self.sinks.then(|| heads().map(|head| [0.5, 12.0, -20.0, 1.5][head % 4]).collect());
        Data { query, key, value, grad_out, grad_lse, query_mask, key_mask, bias, alibi_slopes, sinks }
    }

    fn bias(&self, rng: &mut TestRng) -> Option<Array4<f64>> {
        let hide = |hidden: bool, x: f64| if hidden { f64::NEG_INFINITY } else { x };
        let shape = (self.batch, self.heads(), self.query_len, self.key_len);
        // Numbers that every type holds exactly.
        let mut number = || f64::from(rng.random_range(-16..16)) / 8.0;
        let bias = match self.pairs {
            Pairs::All => return None,
            Pairs::Window => Array4::from_shape_fn(shape, |(_, _, t, s)| hide(t.abs_diff(s) > 5, 0.0)),
            Pairs::Causal => Array4::from_shape_fn(shape, |(_, _, t, s)| hide(s > t, 0.0)),
            Pairs::Holes => Array4::from_shape_fn(shape, |(b, h, t, s)| hide((b + h + t + s) % 2 == 1, 0.0)),
            Pairs::Keys => Array4::from_shape_fn(shape, |(b, _, _, s)| hide(s < 5 * b || s % 3 == 1, 0.0)),
            Pairs::Biased => Array4::from_shape_simple_fn(shape, number),
            Pairs::Documents => Array4::from_shape_fn(shape, |(_, _, t, s)| hide(t / 7 != s / 7, number())),
            Pairs::Huge => {
                Array4::from_shape_fn(
                    shape,
                    |(_, _, t, s)| {
                        if t / 7 == s / 7 || t / 7 * 7 >= self.key_len { number() } else { HUGE }
                    },
                )
            }
        };
        Some(bias)
    }

    fn mask(&self, padding: Padding, length: usize, rng: &mut TestRng) -> Option<Array2<bool>> {
        let (batch, block) = (self.batch, self.block_size);
        let mut mask = |valid: &mut dyn FnMut(usize, usize, &mut TestRng) -> bool| {
            Some(Array2::from_shape_fn((batch, length), |(b, t)| valid(b, t, rng)))
        };
        match padding {
            Padding::None => None,
            Padding::Right => mask(&mut |b, t, _| t < length * (batch - b) / (batch + 1)),
            Padding::Left => mask(&mut |b, t, _| t >= length * (b + 1) / (batch + 1)),
            Padding::Holes => mask(&mut |_, _, rng| rng.random_range(0..3) > 0),
            Padding::Blocks => mask(&mut |b, t, rng| (t / block + b) % 2 == 1 && rng.random_range(0..5) > 0),
            Padding::All => mask(&mut |_, _, _| false),
        }
    }
}

/// Far below every logit, and exact in float32.
pub(crate) const HUGE: f64 = -1e9;

/// Fills padded tokens with what must never reach a result.
pub(crate) fn poison(array: &mut Array4<f64>, mask: Option<&Array2<bool>>) {
    let Some(mask) = mask else { return };
    for ((b, _, t, d), x) in array.indexed_iter_mut() {
        if !mask[[b, t]] {
            *x = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][(t + d) % 3];
        }
    }
}

impl Data {
    /// The same call, by the formulas.
    pub(crate) fn attention<'a>(&'a self, case: &'a Case) -> Attention<'a> {
        Attention {
            query: self.query.view(),
            key: self.key.view(),
            value: self.value.view(),
            query_mask: self.query_mask.as_ref().map(|array| array.view()),
            key_mask: self.key_mask.as_ref().map(|array| array.view()),
            bias: self.bias.as_ref().map(|array| array.view()),
            softcap: case.softcap,
            alibi_slopes: self.alibi_slopes.as_deref(),
            sinks: self.sinks.as_deref(),
            window: case.window,
            offsets: &case.offsets,
            key_lengths: case.key_lengths.as_deref(),
            pool_queries: case.pool_queries,
            block_size: case.block_size,
            scale: case.scale,
            mode: case.mode,
            coarse: case.coarse_term(),
            coarse_shift: case.coarse_shift,
            score: case.score,
        }
    }
}
