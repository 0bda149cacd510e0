//! Random inputs of a given shape.

use mra_attention::reference::Attention;
use mra_attention::{Budget, Mode};
use ndarray::{Array2, Array3, Array4, Axis};
use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::Rounded;

/// Which tokens are padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Padding {
    /// No mask.
    None,
    /// Sequences of different lengths.
    Right,
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
    /// A mask: every other pair.
    Holes,
    /// A bias, different for each head.
    Biased,
    /// A bias, and documents of 7 tokens that do not see each other.
    Documents,
}

/// Everything that a call depends on; the numbers come from the seed.
#[derive(Debug, Clone)]
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
    pub(crate) mode: Mode,
    pub(crate) query_padding: Padding,
    pub(crate) key_padding: Padding,
    pub(crate) pairs: Pairs,
    pub(crate) budget: Budget,
    pub(crate) scale: Option<f64>,
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
            mode: Mode::Full,
            query_padding: Padding::None,
            key_padding: Padding::None,
            pairs: Pairs::All,
            budget: Budget { blocks_per_row: 2.0, num_blocks: None, first_blocks: 0, diagonal_blocks: 0 },
            scale: None,
            magnitude: 1.0,
            grad_lse: true,
            equal_heads: false,
            seed: 0,
        }
    }
}

/// The numbers of a case, each one exact in the type it is stored in. Padded tokens hold NaN and infinities.
pub(crate) struct Data {
    pub(crate) query: Array4<f64>,
    pub(crate) key: Array4<f64>,
    pub(crate) value: Array4<f64>,
    pub(crate) grad_out: Array4<f64>,
    pub(crate) grad_lse: Option<Array3<f64>>,
    pub(crate) query_mask: Option<Array2<bool>>,
    pub(crate) key_mask: Option<Array2<bool>>,
    pub(crate) bias: Option<Array4<f64>>,
}

impl Case {
    pub(crate) fn heads(&self) -> usize {
        self.kv_heads * self.group
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
        let key = numbers(self.kv_heads, self.key_len, self.head_dim, 1.0, key_mask.as_ref());
        let value = numbers(self.kv_heads, self.key_len, self.value_dim, 1.0, key_mask.as_ref());
        let grad_out = numbers(self.heads(), self.query_len, self.value_dim, 1.0, query_mask.as_ref());
        let grad_lse =
            self.grad_lse.then(|| numbers(self.heads(), self.query_len, 1, 1.0, query_mask.as_ref()).remove_axis(Axis(3)));
        let bias = self.bias(&mut rng);
        Data { query, key, value, grad_out, grad_lse, query_mask, key_mask, bias }
    }

    fn bias(&self, rng: &mut TestRng) -> Option<Array4<f64>> {
        let hide = |hidden: bool, x: f64| if hidden { f64::NEG_INFINITY } else { x };
        let shape = (self.batch, self.heads(), self.query_len, self.key_len);
        // Numbers that every type holds exactly.
        let mut number = || f64::from(rng.random_range(-16..16)) / 8.0;
        let bias = match self.pairs {
            Pairs::All => return None,
            Pairs::Window => Array4::from_shape_fn(shape, |(_, _, t, s)| hide(t.abs_diff(s) > 5, 0.0)),
            Pairs::Holes => Array4::from_shape_fn(shape, |(b, h, t, s)| hide((b + h + t + s) % 2 == 1, 0.0)),
            Pairs::Biased => Array4::from_shape_simple_fn(shape, number),
            Pairs::Documents => Array4::from_shape_fn(shape, |(_, _, t, s)| hide(t / 7 != s / 7, number())),
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
            Padding::Holes => mask(&mut |_, _, rng| rng.random_range(0..3) > 0),
            Padding::Blocks => mask(&mut |b, t, rng| (t / block + b) % 2 == 1 && rng.random_range(0..5) > 0),
            Padding::All => mask(&mut |_, _, _| false),
        }
    }
}

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
    pub(crate) fn attention<'a>(&'a self, case: &Case) -> Attention<'a> {
        Attention {
            query: self.query.view(),
            key: self.key.view(),
            value: self.value.view(),
            query_mask: self.query_mask.as_ref().map(|array| array.view()),
            key_mask: self.key_mask.as_ref().map(|array| array.view()),
            bias: self.bias.as_ref().map(|array| array.view()),
            block_size: case.block_size,
            scale: case.scale,
            mode: case.mode,
        }
    }
}
