//! The types that tensors store, with their rounding.

use half::{bf16, f16};
use mra_attention::{Element, Scalar};

/// A floating-point type and its rounding.
pub(crate) trait Rounded: Copy + std::fmt::Debug {
    /// For messages.
    const NAME: &'static str;
    /// The largest relative error of rounding to this type: half a unit in the last place.
    const ROUNDOFF: f64;
    /// Half the smallest positive number: the largest error of rounding where the relative one does not hold.
    const UNDERFLOW: f64;
    /// The nearest number of this type.
    fn round(x: f64) -> Self;
    /// The value.
    fn exact(self) -> f64;
}

/// A type of tensor elements.
pub(crate) trait Number: Rounded + Element<Compute = <Self as Number>::Wide> {
    /// What is computed with: `Compute`, with a bound that a supertrait cannot state.
    type Wide: Rounded + Scalar;
}

macro_rules! number {
    ($t:ident, roundoff = $roundoff:expr, underflow = $underflow:expr, |$x:ident| $round:expr) => {
        impl Number for $t {
            type Wide = <$t as Element>::Compute;
        }

        impl Rounded for $t {
            const NAME: &'static str = stringify!($t);
            const ROUNDOFF: f64 = $roundoff;
            const UNDERFLOW: f64 = $underflow;
            fn round($x: f64) -> Self {
                $round
            }
            fn exact(self) -> f64 {
                f64::from(self)
            }
        }
    };
}

#[allow(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
const fn to_f32(x: f64) -> f32 {
    x as f32
}

// Half of the distance from 1 to the next number: 53, 24, 8 and 11 binary digits.
number!(f64, roundoff = f64::EPSILON / 2.0, underflow = f64::from_bits(1), |x| x);
number!(f32, roundoff = 0.5 / 8_388_608.0, underflow = 0.5 * 1.401_298_464_324_817e-45, |x| to_f32(x));
number!(bf16, roundoff = 0.5 / 128.0, underflow = 0.5 * 9.183_549_615_799_121e-41, |x| bf16::from_f64(x));
number!(f16, roundoff = 0.5 / 1024.0, underflow = 0.5 * 5.960_464_477_539_063e-8, |x| f16::from_f64(x));
