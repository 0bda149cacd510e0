//! Shapes, scale and masks: validated once, passed everywhere.

use super::bias::{Bias, Pairs};
use super::blocks::Blocks;
use crate::error::{Error, Result};
use crate::kernels::Dropout;
use crate::simd::Level;

/// Which terms the softmax has (docs/definitions.md, section 2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Selected blocks exactly, all others by their pooled logit and value: MRA-2.
    Full,
    /// Selected blocks only: MRA-2-s.
    Sparse,
}

/// Which tokens of each sequence of a batch count.
#[derive(Debug, Clone, Copy)]
pub struct Mask<'a> {
    valid: &'a [u8],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Mask<'a> {
    /// A view of bytes, batch by token; a token is valid where the byte is not 0.
    ///
    /// # Errors
    /// If shape and strides reach beyond `valid`. `name` is the argument in the message.
    pub fn new(name: &str, valid: &'a [u8], shape: [usize; 2], strides: [usize; 2]) -> Result<Self> {
        match crate::tensor::span(&shape, &strides) {
            Some(needed) if needed <= valid.len() => Ok(Self { valid, shape, strides }),
            _ => Err(Error::new(format!(
                "{name}: shape {shape:?} with strides {strides:?} reaches beyond its {} bytes",
                valid.len()
            ))),
        }
    }
}

/// What does not follow from the tensors.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// Tokens per block, 1 to [`Problem::MAX_BLOCK`].
    pub block_size: usize,
    /// The factor of the logits; `None` is `1 / sqrt(D)`.
    pub scale: Option<f64>,
    /// Which terms the softmax has.
    pub mode: Mode,
    /// Valid keys.
    pub key_mask: Option<Mask<'a>>,
    /// Valid queries; outputs and gradients of the others are 0.
    pub query_mask: Option<Mask<'a>>,
    /// Which pairs of a query and a key count, or what is added to their logits (docs/definitions.md, section 5).
    pub bias: Option<Bias<'a>>,
    /// The probability with which a weight is dropped, 0 to 1; 0 is no dropout.
    pub dropout: f64,
    /// Decides, with the place of a weight, whether it is dropped; the same for forward and backward.
    pub seed: u64,
    /// Threads to compute on, at least 1. The result does not depend on it.
    pub threads: usize,
    /// The instruction set. Results of different levels differ by rounding.
    pub level: Level,
}

/// One validated call.
#[derive(Debug)]
pub struct Problem<'a> {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) query_len: usize,
    pub(crate) key_len: usize,
    pub(crate) head_dim: usize,
    pub(crate) block_size: usize,
    pub(crate) scale: f64,
    pub(crate) mode: Mode,
    pub(crate) threads: usize,
    pub(crate) level: Level,
    pub(crate) pairs: Option<Pairs<'a>>,
    pub(crate) dropout: Option<Dropout>,
    queries: Vec<Blocks>,
    keys: Vec<Blocks>,
}

impl<'a> Problem<'a> {
    /// The largest block size.
    pub const MAX_BLOCK: usize = 128;

    /// Checks the shapes (batch, head, token, channel) of query and key.
    ///
    /// # Errors
    /// If they do not fit each other or the options; the message names what is wrong.
    pub fn new(query: [usize; 4], key: [usize; 4], options: &Options<'a>) -> Result<Self> {
        let [batch, heads, query_len, head_dim] = query;
        let [key_batch, kv_heads, key_len, key_dim] = key;
        if batch != key_batch || head_dim != key_dim {
            return Err(Error::new(format!(
                "key: shape {key:?} does not fit query of shape {query:?}: batch and head_dim must be equal"
            )));
        }
        if heads != kv_heads && (kv_heads == 0 || heads % kv_heads != 0) {
            return Err(Error::new(format!("key: {kv_heads} heads, expected a divisor of the {heads} heads of query")));
        }
        if head_dim == 0 {
            return Err(Error::new("query: head_dim 0, expected at least 1"));
        }
        if !(1..=Self::MAX_BLOCK).contains(&options.block_size) {
            return Err(Error::new(format!("block_size: {}, expected 1 to {}", options.block_size, Self::MAX_BLOCK)));
        }
        if options.threads == 0 {
            return Err(Error::new("threads: 0, expected at least 1"));
        }
        let scale = options.scale.unwrap_or_else(|| 1.0 / (head_dim as f64).sqrt());
        if !scale.is_finite() {
            return Err(Error::new(format!("scale: {scale}, expected a finite number")));
        }
        if !(0.0..=1.0).contains(&options.dropout) {
            return Err(Error::new(format!("dropout: {}, expected a probability", options.dropout)));
        }
        let queries = blocks("query_mask", batch, query_len, options.block_size, options.query_mask)?;
        let keys = blocks("key_mask", batch, key_len, options.block_size, options.key_mask)?;
        let expected = [batch, heads, query_len, key_len];
        if let Some(bias) = options.bias.filter(|bias| bias.shape != expected) {
            return Err(Error::new(format!("bias: shape {:?}, expected {expected:?}", bias.shape)));
        }
        Ok(Self {
            batch,
            heads,
            kv_heads,
            query_len,
            key_len,
            head_dim,
            block_size: options.block_size,
            scale,
            mode: options.mode,
            threads: options.threads,
            level: options.level,
            pairs: options.bias.map(|bias| Pairs::new(bias, &queries, &keys, options.threads, options.level)),
            dropout: Dropout::new(options.dropout, options.seed),
            queries,
            keys,
        })
    }

    /// What pooling a tensor of this shape needs to know.
    pub(crate) fn for_pooling(shape: [usize; 4], block_size: usize, threads: usize, level: Level) -> Result<Self> {
        let options = Options {
            block_size,
            scale: Some(1.0),
            mode: Mode::Full,
            key_mask: None,
            query_mask: None,
            bias: None,
            dropout: 0.0,
            seed: 0,
            threads,
            level,
        };
        let shape = [shape[0], shape[1], shape[2], shape[3].max(1)];
        Self::new(shape, shape, &options)
    }

    /// Ends the keys of each batch item at a length of its own.
    pub(crate) fn set_key_lengths(&mut self, lengths: &[usize]) {
        if !lengths.is_empty() {
            self.keys = lengths.iter().map(|&length| Blocks::new(length, self.block_size)).collect();
        }
    }

    /// The blocks of the queries of a batch item.
    pub(crate) fn queries(&self, batch: usize) -> &Blocks {
        &self.queries[batch.min(self.queries.len() - 1)]
    }

    /// The blocks of the keys of a batch item.
    pub(crate) fn keys(&self, batch: usize) -> &Blocks {
        &self.keys[batch.min(self.keys.len() - 1)]
    }

    /// Query blocks, live or not.
    pub fn query_blocks(&self) -> usize {
        self.query_len.div_ceil(self.block_size)
    }

    /// Key blocks, live or not.
    pub fn key_blocks(&self) -> usize {
        self.key_len.div_ceil(self.block_size)
    }

    /// Query heads that share a key head.
    pub(crate) fn group_size(&self) -> usize {
        self.heads.checked_div(self.kv_heads).unwrap_or(0)
    }

    /// The key head that a query head shares with its group.
    pub(crate) fn kv_head(&self, head: usize) -> usize {
        head / self.group_size()
    }

    /// The key head of a query head, where the heads of all batch items are numbered through.
    pub(crate) fn kv_row(&self, head: usize) -> usize {
        head / self.heads * self.kv_heads + self.kv_head(head % self.heads)
    }

    /// Heads of all batch items.
    pub(crate) fn all_heads(&self) -> usize {
        self.batch * self.heads
    }

    /// Threads worth starting for products of `multiplications` in all: below some tens of microseconds of work the
    /// hand-over costs more than it brings.
    pub(crate) fn threads_for(&self, multiplications: usize) -> usize {
        const WORTH_A_THREAD: usize = 1 << 20;
        self.threads.min(multiplications / WORTH_A_THREAD + 1)
    }

    /// Threads worth starting to read `elements` for a single operation each, as long as several multiplications.
    pub(crate) fn threads_to_read(&self, elements: usize) -> usize {
        self.threads_for(elements.saturating_mul(8))
    }

    /// Checks that a tensor has this shape.
    pub(crate) fn expect(name: &str, shape: [usize; 4], expected: [usize; 4]) -> Result<()> {
        if shape == expected { Ok(()) } else { Err(Error::new(format!("{name}: shape {shape:?}, expected {expected:?}"))) }
    }
}

/// The blocks of each batch item, or one entry for all of them where nothing is padded.
fn blocks(name: &str, batch: usize, length: usize, size: usize, mask: Option<Mask<'_>>) -> Result<Vec<Blocks>> {
    let Some(mask) = mask else {
        return Ok(vec![Blocks::new(length, size)]);
    };
    if mask.shape != [batch, length] {
        return Err(Error::new(format!("{name}: shape {:?}, expected {:?}", mask.shape, [batch, length])));
    }
    if batch == 0 {
        return Ok(vec![Blocks::new(length, size)]);
    }
    let [by_batch, by_token] = mask.strides;
    Ok((0..batch)
        .map(|item| Blocks::with_padding(length, size, |token| mask.valid[item * by_batch + token * by_token] != 0))
        .collect())
}

impl Problem<'_> {
    /// A number of channels rounded up to whole vectors.
    pub(crate) fn padded<T: crate::simd::Scalar>(&self, channels: usize) -> usize {
        channels.next_multiple_of(T::lanes(self.level))
    }
}
