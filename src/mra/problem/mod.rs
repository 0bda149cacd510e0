//! Inputs and options, validated once; who sees whom.
//!
//! A call has one or more *segments*: sequences that know nothing of each other. Batch items, padded ones, packed sequences and those of
//! a cache are all segments, and differ in where their tokens lie and which of them count.

mod alibi;
mod batch;
mod block_bias;
mod blocks;
mod budget;
mod mask;
mod options;
mod padding;
mod segment;
mod sight;
mod token_kinds;

use std::sync::Arc;

use crate::mra::select::LevelPlace;
pub(crate) use batch::Batch;
pub(crate) use blocks::Blocks;
pub use budget::Budget;
pub(crate) use budget::TokenBudget;
pub use mask::{Bias, BiasData, Mask};
pub use options::{Coarse, CoarserLevel, Layout, Mode, Options, Score};
use padding::Padding;
use segment::Place;
pub(crate) use segment::{Form, Segment};
pub use sight::Window;
pub(crate) use sight::{Forced, Kind, Sight, common};

use crate::error::{Error, Result};
use crate::kernels::Dropout;
use crate::simd::{Level, Scalar};

/// One validated call.
#[derive(Debug, Clone)]
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
    pub(crate) coarse: Coarse,
    pub(crate) coarse_shift: f64,
    pub(crate) score: Score,
    pub(crate) threads: usize,
    pub(crate) level: Level,
    pub(crate) window: Window,
    pub(crate) bias: Option<Bias<'a>>,
    pub(crate) softcap: Option<f64>,
    alibi_slopes: Option<&'a [f64]>,
    sinks: Option<&'a [f64]>,
    pub(crate) budget: Budget,
    pub(crate) dropout: Option<Dropout>,
    pub(crate) segments: Vec<Segment>,
    /// Whether masks may decide which form a segment has.
    pub(crate) form_is_open: bool,
    /// How many sequences are packed, if they are.
    pub(crate) packed: Option<usize>,
    pub(crate) plan_starts: Vec<usize>,
    /// The levels above this one, the coarsest first; each is a problem of the same inputs with larger blocks, and what its plan selects is
    /// refined at the next level. Theirs are empty.
    pub(crate) coarser: Vec<Problem<'a>>,
    /// How many of the finest blocks a block has side by side; 1 at the finest level.
    pub(crate) ratio: usize,
    /// Whether every block of every level is selected.
    everything: bool,
    /// Where the plan of this level lies in that of a batch item.
    pub(crate) plan_place: LevelPlace,
}

impl<'a> Problem<'a> {
    /// The largest block size.
    pub const MAX_BLOCK: usize = 128;

    /// Checks the shapes (batch, head, token, channel) of query and key, and reads masks.
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
            return Err(Error::new(format!("key: {kv_heads} heads, expected as many as query or a divisor of its {heads}")));
        }
        if !(1..=Self::MAX_BLOCK).contains(&options.block_size) {
            return Err(Error::new(format!("block_size: {}, expected 1 to {}", options.block_size, Self::MAX_BLOCK)));
        }
        if options.threads == 0 {
            return Err(Error::new("threads: 0, expected at least 1"));
        }
        let scale = options.scale.unwrap_or_else(|| 1.0 / (head_dim as f64).sqrt());
        if scale.is_nan() {
            return Err(Error::new("scale: NaN, expected a number"));
        }
        if !(0.0..=1.0).contains(&options.dropout) {
            return Err(Error::new(format!("dropout: {}, expected a probability", options.dropout)));
        }
        if !options.coarse_shift.is_finite() {
            return Err(Error::new(format!("coarse_shift: {}, expected a finite number", options.coarse_shift)));
        }
        if let Some(cap) = options.softcap.filter(|cap| !(*cap > 0.0 && cap.is_finite())) {
            return Err(Error::new(format!("softcap: {cap}, expected a positive number")));
        }
        for (name, terms) in [("alibi_slopes", options.alibi_slopes), ("sinks", options.sinks)] {
            if let Some(terms) = terms.filter(|terms| terms.len() != batch * heads) {
                return Err(Error::new(format!("{name}: {} numbers, expected {batch} times {heads}", terms.len())));
            }
        }
        options.budget.validate(heads)?;
        validate_levels(options, heads)?;
        for (name, mask, length) in [("query_mask", options.query_mask, query_len), ("key_mask", options.key_mask, key_len)] {
            if let Some(mask) = mask.filter(|mask| mask.shape != [batch, length]) {
                return Err(Error::new(format!("{name}: shape {:?}, expected {:?}", mask.shape, [batch, length])));
            }
        }
        let expected = [batch, heads, query_len, key_len];
        if let Some(bias) = options.bias.filter(|bias| bias.shape != expected) {
            return Err(Error::new(format!("bias: shape {:?}, expected {expected:?}", bias.shape)));
        }
        let places = places(batch, query_len, key_len, options)?;
        let base = Self {
            batch,
            heads,
            kv_heads,
            query_len,
            key_len,
            head_dim,
            block_size: options.block_size,
            // Without channels every logit is 0.
            scale: if head_dim == 0 { 0.0 } else { scale },
            mode: options.mode,
            coarse: options.coarse,
            coarse_shift: in_float32(options.coarse_shift),
            score: options.score,
            threads: options.threads,
            level: options.level,
            window: options.window,
            bias: options.bias,
            softcap: options.softcap.filter(|&cap| cap <= LARGEST_SOFTCAP).map(|cap| cap.max(1.0 / LARGEST_SOFTCAP)),
            alibi_slopes: options.alibi_slopes,
            sinks: options.sinks,
            budget: options.budget.clone(),
            dropout: Dropout::new(options.dropout, options.seed),
            segments: Vec::new(),
            form_is_open: options.window.is_unlimited() && options.pool_queries,
            packed: matches!(options.layout, Layout::Packed { .. }).then_some(places.len()),
            plan_starts: Vec::new(),
            coarser: Vec::new(),
            ratio: 1,
            everything: options.budget.is_everything()
                && options.coarser.iter().all(|level| level.blocks_per_row.iter().all(|rate| rate.is_infinite())),
            plan_place: LevelPlace::default(),
        };
        let found = Padding::of_each(&places, options);
        let mut problem = base.with_levels(&places, options, &found, None);
        let by_tokens = |index: usize| problem.levels().any(|level| level.segments[index].form == Form::Token);
        let forms: Vec<Form> =
            (0..places.len()).map(|index| if by_tokens(index) { Form::Token } else { Form::Block }).collect();
        let agree = |level: &Self| level.segments.iter().zip(&forms).all(|(segment, &form)| segment.form == form);
        if !problem.levels().all(agree) {
            problem = base.with_levels(&places, options, &found, Some(&forms));
        }
        problem.place_plans();
        if problem.expands() && problem.segments.iter().any(|segment| segment.form == Form::Block) {
            if problem.softcap.is_some() {
                return Err(Error::new("softcap: given, expected None with the first-order coarse term"));
            }
            if problem.is_ladder() {
                return Err(Error::new("coarser: given, expected no level with the first-order coarse term"));
            }
        }
        Ok(problem)
    }

    /// The same with all levels. A sequence has one form: without `forms` each level has the token form where the one above has it, though
    /// small blocks may be free of what hides pairs of large ones.
    fn with_levels(
        &self,
        places: &[Place],
        options: &Options<'a>,
        found: &[Option<Arc<Padding>>],
        forms: Option<&[Form]>,
    ) -> Self {
        let coarser = options.coarser.iter().map(|level| (level.block_size, &level.blocks_per_row));
        let mut levels: Vec<Self> = Vec::with_capacity(options.coarser.len() + 1);
        for (index, (size, rates)) in coarser.chain([(options.block_size, &options.budget.blocks_per_row)]).enumerate() {
            let of_above = |above: &Self| above.segments.iter().map(|segment| segment.form).collect::<Vec<_>>();
            let above = levels.last().map(of_above);
            levels.push(Self {
                block_size: size,
                ratio: size / options.block_size,
                budget: Budget { blocks_per_row: rates.clone(), ..options.budget.clone() },
                segments: segments(places, options, found, size, forms.or(above.as_deref())),
                dropout: self.dropout.map(|dropout| dropout.at_level(index)),
                ..self.clone()
            });
        }
        let finest = levels.pop().expect("the finest level");
        Self { coarser: levels, ..finest }
    }

    /// All levels, the coarsest first; the last one is the problem itself.
    pub(crate) fn levels(&self) -> impl ExactSizeIterator<Item = &Self> + DoubleEndedIterator {
        let levels: Vec<&Self> = self.coarser.iter().chain(std::iter::once(self)).collect();
        levels.into_iter()
    }

    /// Whether there are levels above the finest blocks.
    pub(crate) fn is_ladder(&self) -> bool {
        !self.coarser.is_empty()
    }

    /// Whether every block of every head is selected at every level.
    pub(crate) fn is_everything(&self) -> bool {
        self.everything
    }

    /// Threads worth starting for products of `multiplications` in all: below some tens of microseconds of work the
    /// hand-over costs more than it brings.
    pub(crate) fn threads_for(&self, multiplications: usize) -> usize {
        threads_for(self.threads, multiplications)
    }

    /// Threads worth starting to read `elements` for a single operation each, as long as several multiplications.
    pub(crate) fn threads_to_read(&self, elements: usize) -> usize {
        self.threads_for(elements.saturating_mul(8))
    }

    /// Checks that a tensor has this shape.
    pub(crate) fn expect(name: &str, shape: [usize; 4], expected: [usize; 4]) -> Result<()> {
        if shape == expected { Ok(()) } else { Err(Error::new(format!("{name}: shape {shape:?}, expected {expected:?}"))) }
    }

    /// Whether the coarse blocks of the block form are expanded to first order.
    pub(crate) fn expands(&self) -> bool {
        self.mode == Mode::Full && self.coarse == Coarse::FirstOrder
    }

    /// A number of channels rounded up to whole vectors.
    pub(crate) fn padded<T: Scalar>(&self, channels: usize) -> usize {
        channels.next_multiple_of(T::lanes(self.level))
    }

    /// Whether an additive bias belongs to the logits.
    pub(crate) fn additive_bias(&self) -> Option<&Bias<'a>> {
        self.bias.as_ref().filter(|bias| bias.is_additive())
    }

    /// The slope of the bias by distance of a head, if there is one.
    pub(crate) fn alibi_slope(&self, item: usize, head: usize) -> Option<f64> {
        self.alibi_slopes.map(|slopes| in_float32(slopes[item * self.heads + head]))
    }

    /// Whether biases by distance belong to the logits.
    pub(crate) fn has_alibi(&self) -> bool {
        self.alibi_slopes.is_some()
    }

    /// Whether heads have a logit that counts in the denominators alone.
    pub(crate) fn has_sinks(&self) -> bool {
        self.sinks.is_some()
    }

    /// The logit of a head that counts in the denominators alone, if there is one.
    pub(crate) fn sink(&self, item: usize, head: usize) -> Option<f64> {
        let of_head = |sinks: &[f64]| sinks[item * self.heads + head];
        // Minus infinity is no sink.
        self.sinks.map(of_head).filter(|&sink| sink != f64::NEG_INFINITY).map(in_float32)
    }

    /// What a query of a head sees; token form.
    pub(crate) fn sight<'s>(&self, segment: &'s Segment, head: usize, token: usize) -> Sight<'s> {
        segment.sight(&self.window, head, token, self.block_size)
    }

    /// The budget of the tokens of a head of a segment.
    pub(crate) fn token_budget(&self, segment: &Segment, head: usize) -> TokenBudget {
        self.budget.of_token(head, segment.live_rows())
    }
}

/// A softcap above this one changes no logit that could matter, and one below its inverse makes all logits alike. Within, float32 holds
/// quotients of a logit and the softcap as normal numbers.
const LARGEST_SOFTCAP: f64 = 1e18;

/// A number of a head, in the range of float32: an infinite one would make NaN of differences.
fn in_float32(x: f64) -> f64 {
    x.clamp(f64::from(f32::MIN), f64::from(f32::MAX))
}

/// See [`Problem::threads_for`].
pub(crate) fn threads_for(threads: usize, multiplications: usize) -> usize {
    const WORTH_A_THREAD: usize = 1 << 20;
    threads.min(multiplications / WORTH_A_THREAD + 1)
}

/// Where the segments lie.
fn places(batch: usize, query_len: usize, key_len: usize, options: &Options<'_>) -> Result<Vec<Place>> {
    match options.layout {
        Layout::Dense { offsets, key_lengths } => {
            if offsets.len() != 1 && offsets.len() != batch {
                return Err(Error::new(format!("offsets: {} numbers, expected 1 or {batch}", offsets.len())));
            }
            if let Some(lengths) = key_lengths {
                if lengths.len() != batch {
                    return Err(Error::new(format!("key_lengths: {} numbers, expected {batch}", lengths.len())));
                }
                if let Some(length) = lengths.iter().find(|&&length| length > key_len) {
                    return Err(Error::new(format!("key_lengths: {length}, expected at most the {key_len} keys of key")));
                }
            }
            Ok((0..batch)
                .map(|item| Place {
                    index: item,
                    batch: item,
                    queries: 0..query_len,
                    keys: 0..key_lengths.map_or(key_len, |lengths| lengths[item]),
                    offset: offsets[item.min(offsets.len() - 1)],
                })
                .collect())
        }
        Layout::Packed { queries, keys, lower_right } => {
            check_boundaries("queries", queries, query_len)?;
            check_boundaries("keys", keys, key_len)?;
            if batch != 1 || queries.len() != keys.len() {
                return Err(Error::new(format!(
                    "queries and keys: {} and {} boundaries and a batch of {batch}, expected as many boundaries and a batch of 1",
                    queries.len(),
                    keys.len()
                )));
            }
            if options.key_mask.is_some() || options.query_mask.is_some() || options.bias.is_some() {
                return Err(Error::new("key_mask, query_mask, bias: given, expected none of them for packed sequences"));
            }
            Ok((0..queries.len() - 1)
                .map(|index| {
                    let (queries, keys) = (queries[index]..queries[index + 1], keys[index]..keys[index + 1]);
                    let offset = if lower_right { blocks::to_i64(keys.len()) - blocks::to_i64(queries.len()) } else { 0 };
                    Place { index, batch: 0, queries, keys, offset }
                })
                .collect())
        }
    }
}

/// Checks the sizes and budgets of the levels above the finest blocks.
fn validate_levels(options: &Options<'_>, heads: usize) -> Result<()> {
    let sizes: Vec<usize> = options.coarser.iter().map(|level| level.block_size).chain([options.block_size]).collect();
    let fits = |above: usize, size: usize| above.is_multiple_of(size) && (2..=Problem::MAX_BLOCK).contains(&(above / size));
    if !sizes.windows(2).all(|pair| fits(pair[0], pair[1])) {
        let most = Problem::MAX_BLOCK;
        return Err(Error::new(format!("block sizes: {sizes:?}, expected each to be 2 to {most} times the next one")));
    }
    if options.budget.num_blocks.is_some() && !options.coarser.is_empty() {
        return Err(Error::new("num_blocks: given, expected None where there are several levels"));
    }
    options
        .coarser
        .iter()
        .try_for_each(|level| Budget { blocks_per_row: level.blocks_per_row.clone(), ..options.budget.clone() }.validate(heads))
}

fn check_boundaries(name: &str, boundaries: &[usize], total: usize) -> Result<()> {
    let rising = boundaries.is_sorted() && boundaries.first() == Some(&0) && boundaries.last() == Some(&total);
    if rising {
        Ok(())
    } else {
        Err(Error::new(format!("{name}: boundaries {boundaries:?}, expected to rise from 0 to {total}")))
    }
}

/// The segments at these places, with blocks of this size and, if it is known, of this form; one for those that are alike. `found` is what
/// the bias says of the tokens of each.
fn segments(
    places: &[Place],
    options: &Options<'_>,
    found: &[Option<Arc<Padding>>],
    size: usize,
    forms: Option<&[Form]>,
) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::with_capacity(places.len());
    for (place, found) in places.iter().zip(found) {
        let segment = match segments.first() {
            Some(first) if place.is_like_first(places, options) => first.at(place),
            _ => Segment::new(place, options, found.as_deref(), size, forms.map(|forms| forms[place.index])),
        };
        segments.push(segment);
    }
    segments
}
