//! What a token ranks blocks by, pooled logits or estimates of the largest logit of a member: sections 4.1 and 5 of the definitions.

use ndarray::{Array1, ArrayView1};

use super::head::{Head, dot, pool};
use super::select::higher_first;
use crate::Score;

/// Candidates for each block that is chosen.
const CANDIDATES: usize = 4;

const WEIGHT: f64 = 0.85;
const LARGEST_CODE: f64 = 127.0;
const CHANNELS: usize = 4;
const FEW_GROUPS: usize = 16;

/// What the logits of candidates reach if `take` of them are chosen.
fn candidate_bound(logits: &[f64], take: usize) -> f64 {
    let (least, most) = (CANDIDATES * take, CANDIDATES * take + take / 2);
    let count = |bound: f64| logits.iter().filter(|&&logit| logit >= bound).count();
    let top = logits.iter().copied().filter(|&logit| logit > f64::NEG_INFINITY).fold(f64::MIN, f64::max);
    let (mut low, mut high, mut step) = (top, f64::INFINITY, 4.0);
    while count(low) < least && low > f64::MIN {
        (low, high, step) = ((top.min(f64::MAX) - step).max(f64::MIN), low, 2.0 * step);
    }
    while count(low) > most {
        let middle = 0.5 * low + 0.5 * high;
        if !(low < middle && middle < high) {
            break;
        }
        (low, high) = if count(middle) >= least { (middle, high) } else { (low, middle) };
    }
    low
}

/// The largest size among some numbers.
fn largest_size<'a>(numbers: impl Iterator<Item = &'a f64>) -> f64 {
    numbers.fold(0.0, |largest, x| x.abs().max(largest))
}

/// Whole numbers, of which [`LARGEST_CODE`] stands for the largest size.
fn codes(x: ArrayView1<'_, f64>, largest: f64) -> Array1<f64> {
    let per_unit = if largest > 0.0 { LARGEST_CODE / largest } else { 0.0 };
    x.map(|x| (x * per_unit).round_ties_even())
}

/// Which channels a block keeps, by what its keys differ from their mean.
fn kept_channels(differences: &[Array1<f64>]) -> Vec<bool> {
    let channels = differences[0].len();
    let groups = channels.div_ceil(CHANNELS);
    let squares: Vec<f64> = (0..channels).map(|d| differences.iter().map(|row| row[d].powi(2)).sum()).collect();
    let square = |group: usize| squares[group * CHANNELS..].iter().take(CHANNELS).sum::<f64>();
    let mut order: Vec<usize> = (0..groups).collect();
    order.sort_by(|&a, &b| square(b).total_cmp(&square(a)).then(a.cmp(&b)));
    order.truncate(groups.div_ceil(2).max(FEW_GROUPS).min(groups));
    (0..channels).map(|d| order.contains(&(d / CHANNELS))).collect()
}

/// The score of a block for query `t`, whose logit is given: that of the block's mean `kh`. Rows are what the block consists of.
fn max_score(head: &Head<'_>, t: usize, (mean, members): (ArrayView1<'_, f64>, &[ArrayView1<'_, f64>]), logit: f64) -> f64 {
    let differences: Vec<Array1<f64>> = members.iter().map(|row| row - &mean).collect();
    let query = &head.query.row(t) * head.scale;
    let (of_query, of_keys) = (largest_size(query.iter()), largest_size(differences.iter().flatten()));
    let kept = kept_channels(&differences);
    let mut query_codes = codes(query.view(), of_query);
    query_codes.iter_mut().zip(kept).filter(|(_, kept)| !kept).for_each(|(code, _)| *code = 0.0);
    let products = differences.iter().map(|row| dot(query_codes.view(), codes(row.view(), of_keys).view()));
    let units = of_query / LARGEST_CODE * (of_keys / LARGEST_CODE);
    logit + WEIGHT * units * products.fold(f64::NEG_INFINITY, f64::max)
}

/// Sorts the blocks that query `t` is free to choose, the best one first, of which it takes some. They consist of their keys, or of
/// blocks of the level `below`, so many side by side.
pub(super) fn rank(
    head: &Head<'_>,
    below: Option<(&Head<'_>, usize)>,
    t: usize,
    logits: ArrayView1<'_, f64>,
    take: usize,
    free: &mut [usize],
) {
    let mut scores = logits.to_vec();
    if head.score == Score::Max && 0 < take && take < free.len() {
        let bound = candidate_bound(&free.iter().map(|&j| logits[j]).collect::<Vec<_>>(), take);
        let means = pool(head.key, head.segment.keys.iter());
        let below = below.map(|(below, times)| (pool(below.key, below.segment.keys.iter()), &below.segment.keys, times));
        for &j in free.iter() {
            let members: Vec<_> = match &below {
                None => head.segment.keys[j].iter().map(|&s| head.key.row(s)).collect(),
                Some((means, keys, times)) => (j * times..((j + 1) * times).min(keys.len()))
                    .filter(|&child| !keys[child].is_empty())
                    .map(|child| means.row(child))
                    .collect(),
            };
            let score = || max_score(head, t, (means.row(j), &members), logits[j]);
            scores[j] = if logits[j] >= bound { score() } else { f64::NEG_INFINITY };
        }
    }
    free.sort_by(|&a, &b| higher_first(scores[a], scores[b]).then(a.cmp(&b)));
}
