//! Where tensors lie in memory changes nothing.

use mra_attention::{Mode, Tensor};
use ndarray::Array4;

use crate::support::{CAUSAL, Case, Expected, Layout, Number, Padding, Pairs, Setup, check, compute, levels_for};

/// Layouts other than the contiguous one give the same bits.
fn check_layout<E: Number>(case: &Case, layout: Layout) {
    let data = case.data::<E>();
    let expected = Expected::new::<E>(case, &data);
    for level in levels_for::<E>() {
        let setup = Setup { layout, ..Setup::new(level) };
        check::<E>(case, &data, &expected, setup);
        let contiguous = compute::<E>(case, &data, &expected, Setup { layout: Layout::Contiguous, ..setup });
        let other = compute::<E>(case, &data, &expected, setup);
        for ((name, a), (_, b)) in contiguous.bits().into_iter().zip(other.bits()) {
            assert!(a == b, "{name} of {} at {}: {layout:?}, {case:?}", E::NAME, level.name());
        }
    }
}

/// The block form and the token form, each with a mask, too.
fn forms(case: Case) -> [Case; 4] {
    [
        case.clone(),
        Case { window: CAUSAL, ..case.clone() },
        Case { pairs: Pairs::Biased, ..case.clone() },
        Case { pairs: Pairs::Documents, ..case },
    ]
}

#[test]
fn strided() {
    for (head_dim, value_dim) in [(32, 16), (13, 9)] {
        let key_padding = Padding::Holes;
        let case = Case {
            batch: 2,
            kv_heads: 2,
            group: 2,
            query_len: 37,
            key_len: 53,
            head_dim,
            value_dim,
            key_padding,
            ..Case::default()
        };
        for case in forms(case) {
            check_layout::<f64>(&case, Layout::TokensFirst);
            check_layout::<f32>(&case, Layout::TokensFirst);
            check_layout::<half::bf16>(&case, Layout::TokensFirst);
        }
    }
}

/// Inputs, masks' bytes and gradients of outputs with stride 0 over batch and heads.
#[test]
fn expanded() {
    for mode in [Mode::Full, Mode::Sparse] {
        for (head_dim, value_dim) in [(32, 16), (13, 9)] {
            let equal_heads = true;
            let all = Case {
                batch: 3,
                kv_heads: 2,
                group: 2,
                query_len: 21,
                key_len: 30,
                head_dim,
                value_dim,
                mode,
                equal_heads,
                ..Case::default()
            };
            let one_item = Case { batch: 1, key_padding: Padding::Holes, query_padding: Padding::Right, ..all.clone() };
            for case in [all.clone(), one_item, Case { window: CAUSAL, ..all }] {
                check_layout::<f64>(&case, Layout::Expanded);
                check_layout::<f32>(&case, Layout::Expanded);
                check_layout::<half::f16>(&case, Layout::Expanded);
            }
        }
    }
}

#[test]
fn arrays_are_tensors() {
    let array = Array4::from_shape_fn((2, 3, 4, 5), |(b, h, t, d)| (b * 1000 + h * 100 + t * 10 + d) as f64);
    assert_eq!(Tensor::from(array.view()).shape(), [2, 3, 4, 5]);
    let transposed = array.view().reversed_axes();
    let refused = std::panic::catch_unwind(|| Tensor::from(transposed));
    assert!(refused.is_err(), "an array that is not in standard layout");
}
