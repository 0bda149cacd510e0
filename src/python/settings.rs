//! The settings of a call, taken whole, and the problem that they make with its masks.

use pyo3::prelude::*;

use super::borrow::Descriptor;
use crate::{Budget, Coarse, CoarserLevel, Error, Layout, Level, Mode, Options, Problem, Score, Window};

/// Everything that says how attention is computed, as the Python package has it.
#[derive(FromPyObject)]
#[allow(clippy::struct_excessive_bools, reason = "the fields of the named tuple that Python passes")]
pub(super) struct Settings {
    scale: f64,
    /// Of every level, the coarsest first.
    block_sizes: Vec<usize>,
    sparse: bool,
    first_order: bool,
    coarse_shift: f64,
    max_score: bool,
    pool_queries: bool,
    /// -1: no limit.
    window_left: i64,
    /// -1: no limit; 0 is causal.
    window_right: i64,
    lower_right: bool,
    softcap: Option<f64>,
    /// For each level one number, or one for each head.
    blocks_per_row: Vec<f64>,
    num_blocks: Option<usize>,
    first_blocks: Option<usize>,
    diagonal_blocks: usize,
    local_blocks: usize,
    dropout_p: f64,
}

/// Boundaries of packed queries and of packed keys.
pub(super) type Boundaries = (Vec<usize>, Vec<usize>);

/// How the tensors of a call are cut into sequences.
pub(super) enum Sequences {
    Packed(Boundaries),
    Dense { offsets: Vec<i64>, key_lengths: Option<Vec<usize>> },
}

impl Sequences {
    /// From the boundaries of packed sequences, if they are packed.
    pub(super) fn new(
        sequences: Option<Boundaries>,
        settings: &Settings,
        query: &Descriptor,
        key: &Descriptor,
    ) -> crate::Result<Self> {
        let ([.., queries, _], [.., keys, _]) = (query.shape("query")?, key.shape("key")?);
        Ok(Self::of_lengths(sequences, settings, queries, keys))
    }

    /// The same for queries and keys of these lengths.
    pub(super) fn of_lengths(sequences: Option<Boundaries>, settings: &Settings, queries: usize, keys: usize) -> Self {
        if let Some(boundaries) = sequences {
            return Self::Packed(boundaries);
        }
        let signed = |length: usize| i64::try_from(length).expect("a length of a tensor");
        let offset = if settings.lower_right { signed(keys) - signed(queries) } else { 0 };
        Self::Dense { offsets: vec![offset], key_lengths: None }
    }

    fn layout(&self, lower_right: bool) -> Layout<'_> {
        match self {
            Self::Packed((queries, keys)) => Layout::Packed { queries, keys, lower_right },
            Self::Dense { offsets, key_lengths } => Layout::Dense { offsets, key_lengths: key_lengths.as_deref() },
        }
    }
}

/// What hides tokens or pairs of them: `key_mask`, `query_mask`, `attn_bias` and `mask_tiles`.
#[derive(FromPyObject, Default)]
pub(super) struct Masks(Option<Descriptor>, Option<Descriptor>, Option<Descriptor>, Option<Descriptor>);

/// A number for each head of each batch item: `alibi_slopes` and `sinks`.
#[derive(FromPyObject, Default)]
pub(super) struct HeadTerms(Option<Descriptor>, Option<Descriptor>);

impl Masks {
    /// The masks with the names of their arguments.
    pub(super) fn named(&self) -> [(&'static str, Option<&Descriptor>); 4] {
        let Self(key, query, bias, tiles) = self;
        [
            ("key_mask", key.as_ref()),
            ("query_mask", query.as_ref()),
            ("attn_bias", bias.as_ref()),
            ("mask_tiles", tiles.as_ref()),
        ]
    }
}

impl HeadTerms {
    /// The numbers with the names of their arguments.
    pub(super) fn named(&self) -> [(&'static str, Option<&Descriptor>); 2] {
        [("alibi_slopes", self.0.as_ref()), ("sinks", self.1.as_ref())]
    }
}

impl Settings {
    /// The size of the finest blocks, the levels above, and the budget of the finest level.
    fn levels(&self) -> crate::Result<(usize, Vec<CoarserLevel>, Vec<f64>)> {
        let (levels, rates) = (self.block_sizes.len(), self.blocks_per_row.len());
        if levels == 0 || rates == 0 || !rates.is_multiple_of(levels) {
            return Err(Error::new(format!("blocks_per_row: {rates} numbers, expected as many for each of {levels} levels")));
        }
        let mut rates = self.blocks_per_row.chunks_exact(rates / levels).map(<[f64]>::to_vec);
        let (finest, above) = self.block_sizes.split_last().expect("at least one level");
        let coarser =
            above.iter().zip(&mut rates).map(|(&block_size, blocks_per_row)| CoarserLevel { block_size, blocks_per_row });
        let coarser = coarser.collect();
        Ok((*finest, coarser, rates.next().expect("as many as levels")))
    }

    /// # Safety
    /// - The masks and the terms belong to tensors that live, unchanged, as long as the problem.
    pub(super) unsafe fn problem<'p>(
        &self,
        [query, key]: [[usize; 4]; 2],
        masks: &Masks,
        head_terms: &HeadTerms,
        sequences: &'p Sequences,
        seed: u64,
        threads: usize,
    ) -> crate::Result<Problem<'p>> {
        let [batch, heads, query_len, _] = query;
        let limit = |name: &str, limit: i64| match usize::try_from(limit) {
            Ok(limit) => Ok(Some(limit)),
            Err(_) if limit == -1 => Ok(None),
            Err(_) => Err(Error::new(format!("{name}: {limit}, expected -1 (no limit) or more"))),
        };
        // SAFETY: the caller's; `Descriptor` checks the rest.
        let mask = |name, mask: &Option<Descriptor>| mask.as_ref().map(|mask| unsafe { mask.mask(name) }).transpose();
        // SAFETY: as above.
        let terms =
            |name, terms: &Option<Descriptor>| terms.as_ref().map(|terms| unsafe { terms.contiguous(name) }).transpose();
        let pairs = [batch, heads, query_len, key[2]];
        let (block_size, coarser, blocks_per_row) = self.levels()?;
        let options = Options {
            block_size,
            coarser,
            scale: Some(self.scale),
            mode: if self.sparse { Mode::Sparse } else { Mode::Full },
            coarse: if self.first_order { Coarse::FirstOrder } else { Coarse::Mean },
            coarse_shift: self.coarse_shift,
            score: if self.max_score { Score::Max } else { Score::Mean },
            pool_queries: self.pool_queries,
            window: Window { left: limit("window_left", self.window_left)?, right: limit("window_right", self.window_right)? },
            layout: sequences.layout(self.lower_right),
            key_mask: mask("key_mask", &masks.0)?,
            query_mask: mask("query_mask", &masks.1)?,
            // SAFETY: the caller's; `Descriptor` checks the rest.
            bias: masks.2.as_ref().map(|bias| unsafe { bias.bias("attn_bias", pairs, masks.3.as_ref()) }).transpose()?,
            softcap: self.softcap,
            alibi_slopes: terms("alibi_slopes", &head_terms.0)?,
            sinks: terms("sinks", &head_terms.1)?,
            budget: Budget {
                blocks_per_row,
                num_blocks: self.num_blocks,
                first_blocks: self.first_blocks,
                diagonal_blocks: self.diagonal_blocks,
                local_blocks: self.local_blocks,
            },
            dropout: self.dropout_p,
            seed,
            threads,
            level: Level::current()?,
        };
        Problem::new(query, key, &options)
    }
}
